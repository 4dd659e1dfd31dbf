//! Requests to the admin API.

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use wasinetd::admin::AdminAddress;

use super::error::CtlError;

/// Sends requests to one server.
pub(super) struct AdminClient {
    address: AdminAddress,
    token: Option<String>,
}

impl AdminClient {
    pub(super) fn new(address: AdminAddress, token: Option<String>) -> Self {
        Self { address, token }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CtlError> {
        self.request(Method::GET, path, Vec::new()).await
    }

    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, CtlError> {
        self.request(Method::DELETE, path, Vec::new()).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, CtlError> {
        self.request(Method::POST, path, body).await
    }

    /// Passes the body of a response to `take` as it arrives. Stops when `take` returns false.
    pub(super) async fn stream(
        &self,
        path: &str,
        mut take: impl FnMut(&[u8]) -> bool,
    ) -> Result<(), CtlError> {
        let mut response = self.send(Method::GET, path, Vec::new()).await?;
        while let Some(frame) = response.body_mut().frame().await {
            let frame = frame.map_err(|error| self.failed(error))?;
            if !frame.into_data().is_ok_and(|bytes| take(&bytes)) {
                break;
            }
        }
        Ok(())
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, CtlError> {
        let response = self.send(method, path, body).await?;
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| self.failed(error))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| self.failed(error))
    }

    /// Sends a request and returns its response, if that is a success.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, CtlError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            // The path is invalid: the only variable text in it is the name of a service.
            .map_err(|_| {
                CtlError::usage("the name of a service consists of letters, digits, - and _")
            })?;
        let response = match &self.address {
            AdminAddress::Unix(path) => match UnixStream::connect(path).await {
                Ok(stream) => self.send_on(stream, request).await?,
                Err(error) => return Err(self.failed(error)),
            },
            AdminAddress::Loopback(address) => match TcpStream::connect(address).await {
                Ok(stream) => self.send_on(stream, request).await?,
                Err(error) => return Err(self.failed(error)),
            },
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| self.failed(error))?.to_bytes();
        Err(CtlError::from_response(status, &body))
    }

    async fn send_on<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CtlError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed(error))?;
        // If the connection fails, so does the response.
        tokio::spawn(connection);
        let response = sender.send_request(request).await;
        response.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: impl std::fmt::Display) -> CtlError {
        CtlError::unavailable(format!(
            "cannot reach the server at {}: {error}; is it running with this --admin?",
            self.address
        ))
    }
}
