// The session stream: notices down, acknowledgements up, whatever happens to the stream below it.
//
//   attach ──Welcome──► live ──stream breaks──► lost ──same token──► live, un-acknowledged notices come again
//                                                └──token unknown or fenced──► void: drop everything, begin anew
//
// While it is lost nothing that is held may be used: the server may take it away, and could not say so.
import grpc from '@grpc/grpc-js';

const RETRY_MS = 100;
const RESULTS_KEPT_MAX = 4096;
const sleep = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

export class Session {
  /**
   * @param stub SessionService's client
   * @param driver onNotice(notice, seq) -> result or undefined; ended(notice) -> a promise of the accesses that it must wait for;
   *     onVoid(why): everything that was held is void; onBegun(): a new session has begun, register again
   */
  constructor(stub, name, chaos, driver) {
    Object.assign(this, { stub, name, chaos, driver });
    this.requests = new Map();
    this.lastRequest = 0;
    this.left = false;
    this.beginAnew();
    this.waitUntilReady();
    this.attach();
  }

  beginAnew() {
    this.token = '';
    this.handled = 0n; // every notice up to this one has been given to the driver
    this.through = 0n; // ... and what it took is not used any more: what an acknowledgement says
    this.acknowledging = Promise.resolve();
    this.results = new Map(); // seq -> what the driver answered; told again when a notice comes again
  }

  /** Resolves when the session is live and the driver is registered. */
  waitUntilReady() {
    this.live = false;
    this.generation = (this.generation ?? 0) + 1; // another one: what was asked before may have failed for that
    this.ready = new Promise((resolve) => { this.becomeReady = resolve; });
  }

  attach() {
    const metadata = new grpc.Metadata();
    if (this.chaos) metadata.set('mmubus-chaos', this.chaos);
    const stream = this.stub.Attach(metadata);
    this.stream = stream;
    stream.on('data', (message) => { if (stream === this.stream) this.receive(message); });
    stream.on('end', () => {}); // an error or a status follows
    stream.on('error', (error) => this.broke(stream, error));
    stream.on('status', (status) => { if (status.code === grpc.status.OK) this.broke(stream, status); });
    stream.write({ hello: { name: this.name, version: 1, token: this.token, handled_through: String(this.through) } });
  }

  /** The stream is over. A server that answers anything but "not now" does not know the token any more. */
  async broke(stream, why) {
    if (stream !== this.stream || stream.done) return;
    stream.done = true;
    clearInterval(this.beating);
    if (this.left) { this.becomeOver(); return; }
    if (this.live) this.waitUntilReady();
    for (const { reject } of this.requests.values()) reject(new Error(`the stream broke: ${why.details}`));
    this.requests.clear();
    const forGood = this.fenced || (!this.welcomed && ![grpc.status.UNAVAILABLE, grpc.status.CANCELLED].includes(why.code));
    if (this.token && forGood) this.becomeVoid(why.details);
    this.fenced = this.welcomed = false;
    await sleep(RETRY_MS);
    this.attach();
  }

  becomeVoid(why) {
    this.beginAnew();
    this.driver.onVoid(why);
  }

  receive(message) {
    switch (message.message) {
      case 'welcome': this.begin(message.welcome); break;
      case 'notices': this.handle(message.notices); break;
      case 'fenced': this.fenced = true; break; // the stream ends now
      case 'registered': case 'unregistered': this.requests.get(message.request)?.resolve(message); break;
      case 'rejected': this.requests.get(message.request)?.reject(new Error(message.rejected.error.message)); break;
      default: // heartbeat, draining
    }
  }

  async begin(welcome) {
    this.welcomed = true;
    if (this.token && !welcome.resumed) this.becomeVoid('the server has begun a new epoch');
    const anew = !welcome.resumed;
    this.token = welcome.token;
    const { stream } = this;
    this.beating = setInterval(() => stream.write({ heartbeat: {} }), welcome.lease_s * 1000 / 3);
    let begun = !anew;
    while (!begun && !stream.done) { // after a restart there may be nothing to register on yet
      begun = await this.driver.onBegun().then(() => true, () => sleep(RETRY_MS));
    }
    if (stream.done) return;
    this.live = true;
    this.becomeReady();
  }

  /** Each notice in order; then one acknowledgement, when no access to what was taken is under way any more. */
  handle(batch) {
    let seq = BigInt(batch.first_seq);
    if (seq > this.handled + 1n) { // some are missing: nothing that is held can be trusted
      this.driver.onVoid('notices are missing');
      this.handled = this.through = seq - 1n;
    }
    const waits = [];
    for (const notice of batch.notices) {
      if (seq > this.handled) { // else it comes again
        const result = this.driver.onNotice(notice, seq);
        if (result) this.keep({ seq: String(seq), ...result });
        waits.push(this.driver.ended(notice));
        this.handled = seq;
      }
      seq += 1n;
    }
    const { handled, token } = this;
    const first = BigInt(batch.first_seq);
    this.acknowledging = Promise.all([this.acknowledging, ...waits]).then(() => {
      if (token !== this.token) return; // of a session that is over
      this.through = handled;
      const results = [...this.results.values()].filter((result) => BigInt(result.seq) >= first);
      if (!this.stream.done) this.stream.write({ acknowledge: { through: String(this.through), results } });
    });
  }

  keep(result) {
    this.results.set(result.seq, result);
    if (this.results.size > RESULTS_KEPT_MAX) this.results.delete(this.results.keys().next().value);
  }

  request(fields) {
    const request = String(++this.lastRequest);
    const answered = new Promise((resolve, reject) => { this.requests.set(request, { resolve, reject }); });
    this.stream.write({ request, ...fields });
    return answered.finally(() => this.requests.delete(request));
  }

  /** Go for good; resolves when the server has ended the stream. */
  leave() {
    this.left = true;
    const over = new Promise((resolve) => { this.becomeOver = resolve; });
    if (this.stream.done) this.becomeOver();
    else this.stream.write({ leave: {} });
    return over;
  }
}
