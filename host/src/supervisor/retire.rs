//! The end of services that a reload has removed.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::lifecycle::Controller;
use crate::service::Service;

/// Interval of looks at a service that is being retired. Arbitrary.
const INTERVAL: Duration = Duration::from_millis(200);

/// References to a service that lead no client to it: the one of [`retire`], and the one of the task
/// that watches its old versions.
const OWN_REFERENCES: usize = 2;

/// Waits until no client can reach `service` and its connections have finished, then ends the
/// lifecycles. After `drain_timeout` it ends them with whatever is left.
pub(super) async fn retire(
    service: Arc<Service>,
    controllers: Vec<Arc<Controller>>,
    drain_timeout: Duration,
) {
    let name = service.name().to_string();
    let unused = async {
        // Clients in a backlog or in a handshake may still be led to the service.
        while Arc::strong_count(&service) > OWN_REFERENCES || service.open() > 0 {
            tokio::time::sleep(INTERVAL).await;
        }
    };
    match tokio::time::timeout(drain_timeout, unused).await {
        Ok(()) => info!(service = name, "a removed service has ended"),
        Err(_) => warn!(
            service = name,
            "drain timeout: ending the last connections of a removed service"
        ),
    }
    controllers.iter().for_each(|controller| controller.end());
}
