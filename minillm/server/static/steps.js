// The timeline: a bar a step, as high as the root of its tokens, decodes below and chunks above; a line for its time.

import { prepare, themed } from "./canvas.js";
import { colour, count, element, time } from "./text.js";

const BAR = 9, GAP = 2, TOP = 14, BOTTOM = 16, MAX_KEPT = 1024;

export class Steps {
  constructor(canvas, detail, follow, explain) {
    this.canvas = canvas;
    this.detail = detail;
    this.follow = follow;
    this.explain = explain;
    this.steps = [];
    this.chosen = null;
    this.end = 0; // one past the last step shown, unless it follows
    canvas.addEventListener("click", (event) => this.choose(this.placeOf(event.offsetX)));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("wheel", (event) => this.scroll(event), { passive: false });
  }

  add(steps) {
    this.steps.push(...steps);
    this.steps.splice(0, this.steps.length - MAX_KEPT);
    this.draw();
  }

  clear() {
    this.steps = [];
    this.chosen = null;
  }

  last() {
    return this.steps.length ? this.steps[this.steps.length - 1].step : -1;
  }

  // Places of the first and one past the last step that are shown.
  range() {
    const num = Math.max(1, Math.floor(this.canvas.clientWidth / (BAR + GAP)));
    const stop = this.follow.checked ? this.steps.length : Math.min(this.steps.length, Math.max(num, this.end));
    return [Math.max(0, stop - num), stop];
  }

  placeOf(x) {
    return this.range()[0] + Math.floor(x / (BAR + GAP));
  }

  scroll(event) {
    const moved = Math.sign(event.deltaX || (event.shiftKey ? event.deltaY : 0)) * 4;
    if (!moved) return;
    event.preventDefault();
    this.end = this.range()[1] + moved;
    this.follow.checked = false;
    this.draw();
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
    if (!(event.key in moves) || !this.steps.length) return;
    event.preventDefault();
    const at = this.steps.findIndex((step) => step.step === this.chosen);
    const place = at < 0 ? this.steps.length - 1 : at + moves[event.key];
    this.choose(Math.min(this.steps.length - 1, Math.max(0, place)));
  }

  choose(place) {
    const step = this.steps[place];
    if (!step) return;
    const [first, stop] = this.range();
    this.end = place >= stop ? place + 1 : place < first ? place + stop - first : stop;
    this.follow.checked = false;
    this.chosen = step.step;
    this.show(step);
    this.draw();
  }

  draw() {
    const { context, width, height } = prepare(this.canvas);
    const [first, stop] = this.range();
    const shown = this.steps.slice(first, stop);
    if (!shown.length) return;
    const room = height - TOP - BOTTOM;
    const most = Math.max(...shown.map((step) => step.tokens));
    const slowest = Math.max(...shown.map((step) => step.seconds), 1e-6);
    const base = height - BOTTOM;
    shown.forEach((step, i) => this.bar(context, step, i * (BAR + GAP), base, room * Math.sqrt(step.tokens / most)));
    context.strokeStyle = themed("time");
    context.lineWidth = 1.5;
    context.beginPath();
    shown.forEach((step, i) => {
      const y = base - (room * step.seconds) / slowest;
      context[i ? "lineTo" : "moveTo"](i * (BAR + GAP) + BAR / 2, y);
    });
    context.stroke();
    context.fillStyle = themed("muted");
    context.fillText(`${most} tokens, ${time(slowest)} at most`, 2, 10);
    context.fillText(`step ${shown[0].step}`, 2, height - 3);
    const label = `${shown[shown.length - 1].step}`;
    context.fillText(label, Math.min(width - 30, shown.length * (BAR + GAP) - 4 - 6 * label.length), height - 3);
  }

  bar(context, step, x, base, tall) {
    const parts = step.chunks.map((chunk) => [chunk.tokens, colour(chunk.request)]);
    const decodes = step.tokens - step.chunks.reduce((sum, chunk) => sum + chunk.tokens, 0);
    if (decodes) parts.unshift([decodes, themed("decode")]);
    const full = Math.max(tall, 3 * parts.length); // each part can be seen
    const spare = full - 3 * parts.length;
    let y = base;
    for (const [tokens, fill] of parts) {
      const part = 3 + (spare * tokens) / step.tokens;
      y -= part;
      context.fillStyle = fill;
      context.fillRect(x, y, BAR, part - 0.5);
    }
    if (step.step === this.chosen) {
      context.strokeStyle = themed("text");
      context.lineWidth = 1.5;
      context.strokeRect(x - 1, y - 1, BAR + 2, base - y + 2);
    }
  }

  show(step) {
    const lines = [element("p", "", `Step ${step.step}: ${count(step.tokens, "token")} in ${time(step.seconds)}` +
      ` (${time(step.device_seconds)} on the device), ${step.num_running} running, ${step.num_waiting} waiting.`)];
    if (step.num_decodes) {
      const line = element("p", "", `${count(step.num_decodes, "decode")}: `);
      step.decodes.forEach((request) => line.append(this.chip(request)));
      if (step.num_decodes > step.decodes.length) line.append(" …");
      lines.push(line);
    }
    for (const chunk of step.chunks) {
      const line = element("p", "", "Chunk of ");
      line.append(this.chip(chunk.request), `: ${count(chunk.tokens, "token")} from position ${chunk.start}`);
      lines.push(line);
    }
    for (const wait of step.waits) {
      const what = { budget: "token budget", blocks: "KV blocks", rows: "a free row" }[wait.reason];
      const line = element("p", "", "");
      line.append(this.chip(wait.request), ` waited for ${what}, behind `);
      wait.behind.forEach((request) => line.append(this.chip(request)));
      lines.push(line);
    }
    this.detail.replaceChildren(...lines);
    this.detail.classList.remove("muted");
  }

  chip(request) {
    const made = element("button", "chip", `request ${request}`);
    made.addEventListener("click", async () => {
      const words = await this.explain(request);
      this.detail.replaceChildren(...words.map((text) => element("p", "", text)));
    });
    return made;
  }
}
