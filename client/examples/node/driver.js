// A driver in another language: @grpc/grpc-js and the contract, nothing else of mmubus.
//
//   node driver.js ADDRESS MM START PAGES
//
// It registers on an address space, faults its pages in, reads and writes them by DMA, drops each page that a notice
// names, and acknowledges when it has done so. It tells what happens on standard output, one JSON object a line, and takes
// commands on standard input: "read ADDRESS LENGTH", "write ADDRESS TEXT", "held", "leave".
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const PAGE = 4096n;
const NO_PFN = 0xffffffffffffffffn;
const WRITE = 2;
const HERE = dirname(fileURLToPath(import.meta.url));
const PROTO = process.env.MMUBUS_PROTO ?? join(HERE, '..', '..', '..', 'proto');

const loaded = loader.loadSync(['mmu/v1/session.proto', 'mmu/v1/device.proto'], {
  includeDirs: [PROTO], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { mmu: { v1: mmu } } = grpc.loadPackageDefinition(loaded);

const say = (what, fields = {}) => console.log(JSON.stringify({ what, ...fields }));
const pageOf = (address) => address / PAGE * PAGE;

/** The session: one stream, notices down, acknowledgements up. */
class Session {
  constructor(address, name, onNotice) {
    this.stream = new mmu.SessionService(address, grpc.credentials.createInsecure()).Attach();
    this.onNotice = onNotice;
    this.requests = new Map();
    this.lastRequest = 0;
    this.through = 0n;
    this.welcomed = new Promise((resolve, reject) => { this.resolve = resolve; this.reject = reject; });
    this.over = new Promise((resolve) => this.stream.on('end', resolve));
    this.stream.on('data', (message) => this.receive(message));
    this.stream.on('error', (error) => { say('stream error', { error: error.message }); this.reject(error); });
    this.stream.write({ hello: { name, version: 1 } });
  }

  receive(message) {
    switch (message.message) {
      case 'welcome':
        this.token = message.welcome.token;
        this.beating = setInterval(() => this.stream.write({ heartbeat: {} }), message.welcome.lease_s * 1000 / 3);
        this.resolve(message.welcome);
        break;
      case 'notices': this.handle(message.notices); break;
      case 'fenced': say('fenced', { because: message.fenced.message }); break;
      case 'registered': case 'unregistered': case 'rejected':
        this.requests.get(message.request)?.(message);
        this.requests.delete(message.request);
        break;
      default: // heartbeat, draining
    }
  }

  /** Each notice in order, then one acknowledgement for all of them: it says that they have been handled. */
  handle(batch) {
    let seq = BigInt(batch.first_seq);
    const results = [];
    for (const notice of batch.notices) {
      if (seq > this.through) { // else it came before the stream was resumed
        const result = this.onNotice(notice, seq);
        if (result) results.push({ seq: String(seq), ...result });
        this.through = seq;
      }
      seq += 1n;
    }
    this.stream.write({ acknowledge: { through: String(this.through), results } });
  }

  request(fields) {
    const request = String(++this.lastRequest);
    return new Promise((resolve, reject) => {
      this.requests.set(request, (answer) => answer.message === 'rejected'
        ? reject(new Error(answer.rejected.error.message)) : resolve(answer));
      this.stream.write({ request, ...fields });
    });
  }

  async leave() {
    clearInterval(this.beating);
    this.stream.write({ leave: {} });
    await this.over;
  }
}

/** A shadow page table, kept as the notices say. */
class Driver {
  constructor(address) {
    this.table = new Map(); // address of a page -> {pfn, generation, rights}
    this.written = new Set();
    this.young = new Set();
    this.faults = new Set(); // under way: {start, end, overtakenBy}
    this.session = new Session(address, 'node-driver', (notice, seq) => this.notice(notice, seq));
    this.device = new mmu.DeviceService(address, grpc.credentials.createInsecure());
  }

  async register(mm) {
    await this.session.welcomed;
    const ops = ['RELEASE', 'AGE_PAGE', 'INVALIDATE_PAGE', 'INVALIDATE_RANGE', 'INVALIDATE_ALL']
      .map((op) => `NOTIFIER_OP_${op}`);
    const answer = await this.session.request({ register: { mm, ops, name: 'node-driver' } });
    this.registration = answer.registered.registration;
  }

  notice(notice, seq) {
    if (notice.op === 'NOTIFIER_OP_AGE_PAGE') {
      const young = notice.pages.filter((page) => this.young.delete(BigInt(page)));
      return young.length ? { young } : undefined;
    }
    const everything = ['NOTIFIER_OP_RELEASE', 'NOTIFIER_OP_INVALIDATE_ALL', 'NOTIFIER_OP_FLUSH_ALL'].includes(notice.op);
    const ranges = everything ? [[0n, 1n << 63n]]
      : notice.pages.length ? notice.pages.map((page) => [BigInt(page), BigInt(page) + PAGE])
        : [[BigInt(notice.start), BigInt(notice.end)]];
    const dirty = ranges.flatMap(([start, end]) => this.drop(start, end, seq));
    say('notice', { op: notice.op, start: notice.start, end: notice.end, held: this.table.size });
    return dirty.length ? { dirty } : undefined;
  }

  /** Forget [start, end), and the grants for it that are on their way. Returns the addresses that were written. */
  drop(start, end, seq) {
    for (const fault of this.faults) {
      if (fault.start < end && start < fault.end) fault.overtakenBy = seq;
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

  call(method, request) {
    const metadata = new grpc.Metadata();
    metadata.set('mmubus-session', this.session.token);
    return new Promise((resolve, reject) => this.device[method](
      { registration: this.registration, ...request }, metadata, (error, answer) => error ? reject(error) : resolve(answer)));
  }

  /** A grant that an invalidation has overtaken is void, however late it arrives: ask again. */
  async fault(start, end, write) {
    const fault = { start, end, overtakenBy: 0n };
    this.faults.add(fault);
    try {
      for (;;) {
        fault.overtakenBy = 0n;
        const answer = await this.call('Fault', { start: String(start), end: String(end), write });
        if (answer.retry || BigInt(answer.as_of_seq) < fault.overtakenBy) continue;
        const { pfns, generations, rights } = answer.translations;
        pfns.forEach((pfn, at) => {
          if (BigInt(pfn) !== NO_PFN) {
            this.table.set(start + BigInt(at) * PAGE, { pfn, generation: generations[at], rights: rights[at] });
          }
        });
        return;
      }
    } finally {
      this.faults.delete(fault);
    }
  }

  /** One access, again for as long as pages are lost on the way to it. */
  async access(address, length, write, method, fields) {
    const first = pageOf(address);
    const pages = [];
    for (let page = first; page < address + BigInt(length); page += PAGE) pages.push(page);
    for (;;) {
      const entries = pages.map((page) => this.table.get(page));
      if (entries.some((entry) => !entry || (write && !(entry.rights & WRITE)))) {
        await this.fault(first, pages[pages.length - 1] + PAGE, write);
        continue;
      }
      pages.forEach((page) => { this.young.add(page); if (write) this.written.add(page); });
      try {
        return await this.call(method, {
          addr: String(address), pfns: entries.map((one) => one.pfn), generations: entries.map((one) => one.generation), ...fields,
        });
      } catch (error) {
        const lost = pages.some((page, at) => this.table.get(page) !== entries[at]);
        if (!lost) throw error; // not the race: the table still has what was refused
      }
    }
  }

  async read(address, length) {
    return (await this.access(address, length, false, 'DmaRead', { length })).data;
  }

  async write(address, data) {
    await this.access(address, data.length, true, 'DmaWrite', { data });
  }
}

async function main([address, mm, start, pages]) {
  const driver = new Driver(address);
  await driver.register(mm);
  await driver.fault(BigInt(start), BigInt(start) + BigInt(pages) * PAGE, false);
  say('ready', { registration: driver.registration, held: driver.table.size });
  for await (const line of createInterface({ input: process.stdin })) {
    const [command, at, argument] = line.split(' ');
    try {
      if (command === 'read') say('read', { data: (await driver.read(BigInt(at), Number(argument))).toString() });
      else if (command === 'write') { await driver.write(BigInt(at), Buffer.from(argument)); say('written'); }
      else if (command === 'held') say('held', { held: driver.table.size });
      else if (command === 'leave') break;
    } catch (error) {
      say('error', { message: error.details ?? error.message });
    }
  }
  await driver.session.leave();
  say('left');
  process.exit(0);
}

main(process.argv.slice(2)).catch((error) => { say('error', { message: error.message }); process.exit(1); });
