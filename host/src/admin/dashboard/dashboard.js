// The dashboard of a running wasinetd. The server's answers contain untrusted text, such as the
// errors of guests, so the page shows them as text and never parses them as HTML.

const POLL_INTERVAL = 1000;
const POLL_TIMEOUT = 5000;
const HISTORY_SECONDS = 120;
const MAX_ROWS = 200;
const TOKEN_KEY = 'wasinetd-token';

const byId = (id) => document.getElementById(id);
const dashboard = byId('dashboard');
const dialog = byId('confirm');
const connectionRows = byId('connections').tBodies[0];

/** Answers of `/v1/status` in the last two minutes, the latest last. */
let samples = [];
let connections = [];
/** Values of the limits, and the ID of the process that has them. */
let limits = { pid: null, values: new Map() };
let lastAnswer = null;
/** The element with the focus when the dialog opened. It gets the focus back. */
let dialogOpener = null;
/** Resolves the promise of the dialog's question. */
let resolveQuestion = () => {};

const latest = () => samples.at(-1);

// Requests

class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(method, path, { body, signal } = {}) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  let answer;
  try {
    response = await fetch(path, { method, headers, body, signal });
    answer = await response.json();
  } catch (error) {
    throw new RequestError(error.name === 'TimeoutError' ? 'the request timed out' : 'no answer');
  }
  if (!response.ok) throw new RequestError(answer.error ?? response.statusText, response.status);
  return answer;
}

const get = (path) => request('GET', path, { signal: AbortSignal.timeout(POLL_TIMEOUT) });

// Polling

async function run() {
  for (;;) {
    await untilVisible();
    await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_INTERVAL));
  }
}

async function untilVisible() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener('visibilitychange', resolve, { once: true }));
  }
}

async function poll() {
  try {
    const [status, open] = await Promise.all([get('/v1/status'), get('/v1/connections')]);
    if (status.pid !== limits.pid) await getLimits(status.pid);
    remember(status);
    connections = open;
    lastAnswer = new Date();
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    if (error.status === 401) await askForToken();
    else showUnreachable(error);
    return;
  }
  render();
}

async function getLimits(pid) {
  const answer = await get('/v1/limits');
  limits = { pid, values: new Map(answer.map(({ limit, value }) => [limit, value])) };
}

/** A new process counts from zero, so samples of the old one cannot be compared with it. */
function remember(status) {
  const since = status.uptime - HISTORY_SECONDS;
  samples = samples.filter(({ pid, uptime }) => pid === status.pid && uptime < status.uptime && uptime > since);
  samples.push(status);
}

// The token

/** Removes the token from the address, to keep it out of the browser's history. */
function takeTokenFromAddress() {
  // URLSearchParams would decode a plus as a space.
  const token = new URLSearchParams(location.hash.slice(1).replaceAll('+', '%2B')).get('token');
  if (token === null) return false;
  history.replaceState(null, '', location.pathname);
  storeToken(token);
  return true;
}

/** Drops characters that a browser cannot send in a header. The server then refuses the token. */
function storeToken(token) {
  sessionStorage.setItem(TOKEN_KEY, token.replace(/[^\x21-\x7e]/g, ''));
}

/** Resolves once the operator has entered a token, which may be wrong again. */
function askForToken() {
  const refused = sessionStorage.getItem(TOKEN_KEY) !== null;
  sessionStorage.removeItem(TOKEN_KEY);
  const form = byId('token-form');
  const field = byId('token');
  field.value = '';
  field.setAttribute('aria-invalid', String(refused));
  setText(byId('token-reason'), refused
    ? 'The server does not accept this token. Enter the token that the server was started with.'
    : 'The server requires a token.');
  setText(byId('phase'), '');
  showProblem('');
  dashboard.hidden = true;
  form.hidden = false;
  field.focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      storeToken(field.value);
      form.hidden = true;
      resolve();
    };
  });
}

// Values

const totalEnded = (status) => status.services.reduce((sum, service) => sum + service.ended, 0);

/** Increase of a counter per second between two answers; null without an earlier answer. */
function rate(counter, before, now) {
  return before ? Math.max(counter(now) - counter(before), 0) / (now.uptime - before.uptime) : null;
}

/** The bucket with a quantile of the durations in `now` that are not in `before` yet. Undefined if
 *  there are none. */
function quantile(before, now, fraction) {
  const counts = now.map(({ count }, i) => Math.max(count - (before?.[i]?.count ?? 0), 0));
  let rank = Math.max(Math.ceil(counts.reduce((sum, count) => sum + count, 0) * fraction), 1);
  return now.find((_, i) => (rank -= counts[i]) <= 0);
}

const formatNumber = (number) => number.toLocaleString('en');
const formatDigest = (digest) => digest.slice(0, 12);
const formatTime = (time) => time.replace('T', ' ').replace('Z', ' UTC');

function formatRate(perSecond) {
  if (perSecond === null) return '–';
  return perSecond < 100 ? perSecond.toFixed(1) : formatNumber(Math.round(perSecond));
}

function formatSize(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const unit = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), units.length - 1);
  return `${(bytes / 1024 ** unit).toFixed(unit && 1)} ${units[unit]}`;
}

function formatDuration(seconds) {
  if (seconds < 1) return `${(seconds * 1000).toFixed(1)} ms`;
  const units = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
  const [length, unit] = units.find(([least]) => seconds >= least);
  return `${(seconds / length).toFixed(1)} ${unit}`;
}

/** Uses the server's clock, which may differ from this machine's. */
function formatAge(time) {
  const now = Date.parse(latest().since) + latest().uptime * 1000;
  return formatDuration(Math.max(now - Date.parse(time), 0) / 1000);
}

function formatBucket(bucket) {
  if (!bucket) return '–';
  return bucket.seconds === null ? 'hours' : `≤ ${formatDuration(bucket.seconds)}`;
}

// Rendering

function render() {
  const { phase } = latest();
  dashboard.hidden = false;
  dashboard.classList.remove('stale');
  byId('phase').className = phase;
  setText(byId('phase'), phase);
  document.title = `wasinetd: ${phase}`;
  showProblem(phase === 'draining'
    ? 'The server is draining: it accepts no new connections, and exits when the open ones have finished.'
    : '');
  renderServer();
  renderServices();
  renderLimits();
  renderConnections();
}

function showUnreachable({ message }) {
  document.title = 'wasinetd: unreachable';
  dashboard.classList.add('stale');
  setText(byId('phase'), 'unreachable');
  byId('phase').className = 'unreachable';
  const reason = latest()?.phase === 'draining' ? `${message}; it was draining and may have exited` : message;
  const age = lastAnswer ? ` Showing data from ${lastAnswer.toLocaleTimeString()}.` : '';
  showProblem(`The server cannot be reached (${reason}). Trying again every second.${age}`);
}

function showProblem(text) {
  setText(byId('problem'), text);
}

function showNotice(text, failed = false) {
  byId('notice').classList.toggle('failed', failed);
  setText(byId('notice-text'), text);
  byId('notice-close').hidden = text === '';
}

function renderServer() {
  const status = latest();
  const server = byId('server');
  fill(server, {
    release: status.version,
    open: formatNumber(status.open),
    max: formatNumber(status.max_connections),
    rate: formatRate(rate(totalEnded, samples.at(-2), status)),
    'accept-errors': formatNumber(status.accept_errors),
    uptime: formatDuration(status.uptime),
    since: formatTime(status.since),
    pid: String(status.pid),
  });
  server.querySelector('[data-field=accept-errors]').classList.toggle('bad', status.accept_errors > 0);
  const rates = samples.slice(1).map((now, i) => [now.uptime, rate(totalEnded, samples[i], now)]);
  drawChart(byId('rate-chart'), rates, formatRate);
  drawChart(byId('open-chart'), samples.map(({ uptime, open }) => [uptime, open]), formatNumber);
}

/** Draws values with their times, in seconds. Zero is at the bottom, the peak at the top. */
function drawChart(chart, points, format) {
  const values = points.map(([, value]) => value);
  const highest = Math.max(0, ...values);
  const scaled = points.map(([time, value]) => {
    const x = HISTORY_SECONDS + time - latest().uptime;
    const y = 40 - 38 * (value / (highest || 1));
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  chart.querySelector('polyline').setAttribute('points', scaled.join(' '));
  fill(chart, { latest: values.length > 0 ? format(values.at(-1)) : '–', highest: format(highest) });
}

function renderServices() {
  const [before, now] = [samples.at(-2), latest()];
  sync(byId('services'), now.services, (service) => service.name, createService, (section, service) => {
    const find = (status) => status.services.find(({ name }) => name === service.name);
    const earlier = before && find(before);
    fill(section, {
      name: service.name,
      'total-open': formatNumber(service.open),
      rate: formatRate(rate((status) => find(status)?.ended ?? 0, before, now)),
      p50: formatBucket(quantile(earlier?.durations, service.durations, 0.5)),
      p99: formatBucket(quantile(earlier?.durations, service.durations, 0.99)),
      received: formatSize(service.received),
      sent: formatSize(service.sent),
    });
    section.querySelector('[data-action=rollback]').disabled = !previousOf(service);
    sync(section.querySelector('tbody'), service.versions, (_, i) => i, createFrom('version'), renderVersion);
  });
}

function renderVersion(row, { digest, state, since, open, ended }) {
  const notOk = ended.filter(({ outcome }) => outcome !== 'ok');
  fill(row, {
    digest: formatDigest(digest),
    state,
    since: `${formatTime(since)}, ${formatAge(since)} ago`,
    open: formatNumber(open),
    ended: formatNumber(ended.reduce((sum, { count }) => sum + count, 0)),
    'not-ok': notOk.map(({ outcome, count }) => `${outcome.replaceAll('_', ' ')}: ${formatNumber(count)}`).join(', ') || 'none',
  });
  row.className = state;
}

function renderLimits() {
  const hit = latest().limits_met;
  const hitsBefore = new Map(samples[0].limits_met.map(({ limit, met }) => [limit, met]));
  byId('limits-met').hidden = hit.length === 0;
  byId('no-limits').hidden = hit.length > 0;
  sync(byId('limits-met').tBodies[0], hit, ({ limit }) => limit, createFrom('limit-hits'), (row, { limit, met: hits }) => {
    const recent = hits - (hitsBefore.get(limit) ?? 0);
    const value = limits.values.get(limit) ?? '–';
    fill(row, { limit, value, hits: formatNumber(hits), recent: formatNumber(recent) });
    row.classList.toggle('bad', recent > 0);
  });
  sync(byId('limits').tBodies[0], [...limits.values], ([limit]) => limit, createFrom('limit'), (row, [limit, value]) => {
    fill(row, { limit, value });
  });
}

function renderConnections() {
  const words = byId('filter').value.toLowerCase().split(/\s+/);
  const matching = connections.filter(({ id, peer, service, version }) => {
    const text = `${id} ${peer} ${service} ${version}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  matching.sort((a, b) => b.cpu - a.cpu || b.id - a.id);
  const visibleConnections = keepPlaces(matching.slice(0, MAX_ROWS));
  sync(connectionRows, visibleConnections, ({ id }) => id, createConnection, renderConnection);
  const counts = [Math.min(matching.length, MAX_ROWS), matching.length, connections.length];
  const [visible, found, open] = counts.map(formatNumber);
  setText(byId('shown'), `${visible} of ${found} shown, ${open} open`);
}

/** While a row is in use, no row moves, and the row stays even if its connection has ended: an
 *  operator must not kill another connection than the one aimed at. */
function keepPlaces(chosen) {
  if (!isInUse(connectionRows)) return chosen;
  const rows = [...connectionRows.rows];
  const places = new Map(rows.map((row, place) => [Number(row.dataset.key), place]));
  const placeOf = ({ id }) => places.get(id) ?? rows.length;
  const kept = [...places.keys()]
    .filter((id) => isInUse(rows[places.get(id)]) && !chosen.some((connection) => connection.id === id))
    .map((id) => connections.find((connection) => connection.id === id) ?? { id, ended: true });
  return [...chosen.slice(0, MAX_ROWS - kept.length), ...kept].sort((a, b) => placeOf(a) - placeOf(b));
}

function isInUse(element) {
  const focused = dialog.open ? dialogOpener : document.activeElement;
  const selection = getSelection();
  // A touch screen hovers over the last touched element without end.
  const pointed = matchMedia('(hover: hover)').matches && element.matches(':hover');
  return pointed || element.contains(focused) || (!selection.isCollapsed && selection.containsNode(element, true));
}

function renderConnection(row, { peer, service, version, age, received, sent, cpu, memory, ended }) {
  row.classList.toggle('ended', ended === true);
  if (ended) {
    const button = row.querySelector('button');
    // A disabled button would lose the focus.
    button.setAttribute('aria-disabled', 'true');
    setText(button, 'Ended');
    return;
  }
  fill(row, { peer, service, version, age: formatDuration(age), cpu: formatDuration(cpu) });
  fill(row, { received: formatSize(received), sent: formatSize(sent), memory: formatSize(memory) });
}

// Elements

const createFrom = (template) => () => byId(template).content.firstElementChild.cloneNode(true);

/** Leaves unchanged text alone, to keep a selection in it. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function fill(element, fields) {
  for (const [field, text] of Object.entries(fields)) {
    element.querySelectorAll(`[data-field=${field}]`).forEach((target) => setText(target, text));
  }
}

/** Makes `parent` hold one child per item, in their order. A child belongs to the key of its item.
 *  It is updated in place, and moved only if necessary, because moving loses the focus. */
function sync(parent, items, keyOf, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const children = items.map((item, i) => {
    const key = String(keyOf(item, i));
    const child = old.get(key) ?? create(item);
    child.dataset.key = key;
    old.delete(key);
    update(child, item);
    return child;
  });
  old.forEach((child) => child.remove());
  children.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
}

function createService({ name }) {
  const section = createFrom('service')();
  const [swapButton, rollBackButton] = section.querySelectorAll('button');
  const picker = section.querySelector('input');
  swapButton.setAttribute('aria-label', `Swap guest… of ${name}`);
  rollBackButton.setAttribute('aria-label', `Roll back ${name}`);
  swapButton.addEventListener('click', () => picker.click());
  rollBackButton.addEventListener('click', () => rollBack(name));
  picker.addEventListener('change', () => {
    if (picker.files.length > 0) swap(name, picker.files[0]);
    // Otherwise choosing the same file again would be no change. The chosen file stays valid.
    picker.value = '';
  });
  return section;
}

function createConnection({ id, peer }) {
  const row = createFrom('connection')();
  const button = row.querySelector('button');
  fill(row, { id: String(id) });
  button.setAttribute('aria-label', `Kill connection ${id} of ${peer}`);
  button.addEventListener('click', () => {
    if (button.getAttribute('aria-disabled') !== 'true') kill(id, peer);
  });
  return row;
}

// Actions

/** Asks the operator to confirm an action. Resolves to the answer. */
function confirmed(title, text, action) {
  // A file picker may bring up a second question: one answer must not count for both.
  if (dialog.open) return Promise.resolve(false);
  // The event of a closed dialog comes late: an earlier question may still wait for it.
  resolveQuestion(dialog.returnValue === 'confirmed');
  setText(byId('confirm-title'), title);
  setText(byId('confirm-text'), text);
  setText(byId('confirm-action'), action);
  dialogOpener = document.activeElement;
  // Escape does not change the value.
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((resolve) => {
    resolveQuestion = resolve;
  });
}

dialog.addEventListener('close', () => {
  if (!dialog.open) resolveQuestion(dialog.returnValue === 'confirmed');
});

async function act(doing, method, path, describe, body) {
  showNotice(`${doing}…`);
  try {
    showNotice(describe(await request(method, path, { body })));
  } catch (error) {
    showNotice(`${doing} failed: ${error.message}`, true);
  }
}

const previousOf = (service) => service.versions.find(({ state }) => state === 'previous');
const servicePath = (name, action) => `/v1/services/${encodeURIComponent(name)}/${action}`;

async function kill(id, peer) {
  const text = `The client ${peer} gets a reset, and its guest stops at once.`;
  if (!await confirmed(`Kill connection ${id}?`, text, 'Kill')) return;
  await act(`Killing connection ${id}`, 'DELETE', `/v1/connections/${id}`, () => `Connection ${id} was killed.`);
}

async function swap(name, file) {
  const text = `New connections use ${file.name} (${formatSize(file.size)}) if the server accepts it. ` +
    'Open connections keep their version.';
  if (!await confirmed(`Swap the guest of ${name}?`, text, 'Swap')) return;
  await act(`Swapping ${name} to ${file.name}`, 'POST', servicePath(name, 'swap'), describeSwapped(name), file);
}

async function rollBack(name) {
  const previous = previousOf(latest().services.find((service) => service.name === name));
  const text = `New connections use version ${formatDigest(previous.digest)} again. ` +
    'Open connections keep their version.';
  if (!await confirmed(`Roll back ${name}?`, text, 'Roll back')) return;
  await act(`Rolling back ${name}`, 'POST', servicePath(name, 'rollback'), describeSwapped(name));
}

const describeSwapped = (name) => ({ digest, before, took }) => (digest === before
  ? `Nothing has changed: ${formatDigest(digest)} is the current version of ${name} already.`
  : `${name} now uses ${formatDigest(digest)} instead of ${formatDigest(before)}. The swap took ${formatDuration(took)}.`);

byId('filter').addEventListener('input', renderConnections);
byId('notice-close').addEventListener('click', () => showNotice(''));
addEventListener('hashchange', () => {
  if (takeTokenFromAddress()) location.reload();
});
takeTokenFromAddress();
run().catch((error) => {
  showProblem(`This page has stopped updating: ${error.message}. Reload it.`);
  throw error;
});
