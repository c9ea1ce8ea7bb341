// A driver in another language: @grpc/grpc-js and the contract, nothing else of mmubus.
//
//   mmubus conform --command 'node client/examples/node/driver.js'
//
// It registers on an address space, faults pages in when they are used, reaches them by DMA, drops each page that a notice names,
// and acknowledges when it has done so and nothing is under way to it any more. What it is to do it is told on standard
// input, one JSON object a line, as docs/conform.md describes; it answers on standard output.
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';
import { Session } from './session.js';

const PAGE = 4096n;
const EVERYTHING = [0n, 1n << 64n];
const NO_PFN = 0xffffffffffffffffn;
const WRITE = 2;
const RETRIES_MAX = 64;
const HERE = dirname(fileURLToPath(import.meta.url));
const PROTO = process.env.MMUBUS_PROTO ?? join(HERE, '..', '..', '..', 'proto');
const OPS = ['RELEASE', 'AGE_PAGE', 'INVALIDATE_PAGE', 'INVALIDATE_RANGE', 'INVALIDATE_ALL'];
const OF_EVERYTHING = ['RELEASE', 'INVALIDATE_ALL', 'FLUSH_ALL'].map((op) => `NOTIFIER_OP_${op}`);

const loaded = loader.loadSync(['mmu/v1/session.proto', 'mmu/v1/device.proto'], {
  includeDirs: [PROTO], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { mmu: { v1: mmu } } = grpc.loadPackageDefinition(loaded);

const pageOf = (address) => address / PAGE * PAGE;

/** What a notice covers: [start, end) ranges. */
function rangesOf(notice) {
  if (OF_EVERYTHING.includes(notice.op)) return [EVERYTHING];
  if (notice.pages.length) return notice.pages.map((page) => [BigInt(page), BigInt(page) + PAGE]);
  return [[BigInt(notice.start), BigInt(notice.end)]];
}

/** A shadow page table, kept as the notices say. */
class Driver {
  constructor(address, mm, name, chaos) {
    this.mm = mm;
    this.name = name;
    this.table = new Map(); // address of a page -> {pfn, generation, rights}
    this.written = new Set();
    this.young = new Set();
    this.faults = new Set(); // under way: {start, end, overtakenBy}
    this.accesses = new Map(); // under way: a promise of its end -> [start, end)
    this.device = new mmu.DeviceService(address, grpc.credentials.createInsecure());
    this.session = new Session(new mmu.SessionService(address, grpc.credentials.createInsecure()), name, chaos, this);
  }

  // What the session tells.

  async onBegun() {
    const ops = OPS.map((op) => `NOTIFIER_OP_${op}`);
    const answer = await this.session.request({ register: { mm: this.mm, ops, name: this.name } });
    this.registration = answer.registered.registration;
  }

  onVoid() {
    this.drop(...EVERYTHING, 1n << 64n);
  }

  onNotice(notice, seq) {
    if (notice.op === 'NOTIFIER_OP_AGE_PAGE') {
      const young = notice.pages.filter((page) => this.young.delete(BigInt(page)));
      return young.length ? { young } : undefined;
    }
    const dirty = rangesOf(notice).flatMap(([start, end]) => this.drop(start, end, seq));
    return dirty.length ? { dirty } : undefined;
  }

  /** The end of the accesses to what a notice takes that have begun. */
  ended(notice) {
    if (notice.op === 'NOTIFIER_OP_AGE_PAGE') return undefined;
    const ranges = rangesOf(notice);
    const touched = ([low, high]) => ranges.some(([start, end]) => low < end && start < high);
    return Promise.all([...this.accesses].filter(([, range]) => touched(range)).map(([access]) => access));
  }

  /** Forget [start, end), and the grants for it that are on their way. Returns the addresses that were written. */
  drop(start, end, seq) {
    for (const fault of this.faults) {
      if (fault.start < end && start < fault.end && seq > fault.overtakenBy) fault.overtakenBy = seq;
    }
    const dirty = [];
    for (const page of this.table.keys()) {
      if (page >= start && page < end) {
        this.table.delete(page);
        this.young.delete(page);
        if (this.written.delete(page)) dirty.push(String(page));
      }
    }
    return dirty;
  }

  // What the device does.

  async read(address, length) {
    return (await this.access(address, length, false, 'DmaRead', { length })).data;
  }

  async write(address, data) {
    await this.access(address, data.length, true, 'DmaWrite', { data });
  }

  /** One access, again for as long as pages, or the session, are lost on the way to it. */
  async access(address, length, write, method, fields) {
    const pages = [];
    for (let page = pageOf(address); page < address + BigInt(length); page += PAGE) pages.push(page);
    for (let attempt = 0; attempt < RETRIES_MAX; attempt += 1) {
      await this.session.ready;
      const { generation } = this.session;
      const entries = pages.map((page) => this.table.get(page));
      const missing = entries.some((entry) => !entry || (write && !(entry.rights & WRITE)));
      try {
        if (missing) await this.fault(pages[0], pages[pages.length - 1] + PAGE, write);
        else return await this.transfer(pages, entries, write, method, { addr: String(address), ...fields });
      } catch (error) {
        const lost = generation !== this.session.generation || pages.some((page, at) => this.table.get(page) !== entries[at]);
        if (!lost) throw error; // not the race: the table still has what was refused
      }
    }
    throw new Error(`an access to ${address.toString(16)} was overtaken ${RETRIES_MAX} times in a row`);
  }

  /** Begun and ended in sight of the notices: what takes one of its pages is acknowledged when it has ended. */
  async transfer(pages, entries, write, method, fields) {
    pages.forEach((page) => { this.young.add(page); if (write) this.written.add(page); });
    const answer = this.call(method, {
      pfns: entries.map((one) => one.pfn), generations: entries.map((one) => one.generation), ...fields,
    });
    const ended = answer.catch(() => {});
    this.accesses.set(ended, [pages[0], pages[pages.length - 1] + PAGE]);
    ended.then(() => this.accesses.delete(ended));
    return answer;
  }

  /** A grant that an invalidation has overtaken is void, however late it arrives: it is asked for again. */
  async fault(start, end, write) {
    const fault = { start, end, overtakenBy: 0n };
    this.faults.add(fault);
    try {
      const answer = await this.call('Fault', { start: String(start), end: String(end), write });
      if (answer.retry || BigInt(answer.as_of_seq) < fault.overtakenBy) return;
      const { pfns, generations, rights } = answer.translations;
      pfns.forEach((pfn, at) => {
        if (BigInt(pfn) !== NO_PFN) {
          this.table.set(start + BigInt(at) * PAGE, { pfn, generation: generations[at], rights: rights[at] });
        }
      });
    } finally {
      this.faults.delete(fault);
    }
  }

  call(method, request) {
    const metadata = new grpc.Metadata();
    metadata.set('mmubus-session', this.session.token);
    return new Promise((resolve, reject) => {
      this.device[method]({ registration: this.registration, ...request }, metadata, (error, answer) => {
        if (error) reject(error); else resolve(answer);
      });
    });
  }
}

/** What is asked on standard input, done and answered. */
class Tester {
  async attach({ address, mm, name, chaos }) {
    this.driver = new Driver(address, mm, name, chaos);
    await this.driver.session.ready;
    return {};
  }

  async read({ address, length }) {
    return { data: (await this.driver.read(BigInt(address), length)).toString('hex') };
  }

  async write({ address, data }) {
    await this.driver.write(BigInt(address), Buffer.from(data, 'hex'));
    return {};
  }

  async held() {
    return { held: this.driver.table.size };
  }

  async leave() {
    await this.driver.session.leave();
    return {};
  }
}

const tester = new Tester();
for await (const line of createInterface({ input: process.stdin })) {
  const { n, do: what, ...fields } = JSON.parse(line);
  tester[what](fields).catch((error) => ({ error: error.details ?? error.message })).then((answer) => {
    process.stdout.write(`${JSON.stringify({ n, ...answer })}\n`);
    if (what === 'leave') process.exit(0);
  });
}
