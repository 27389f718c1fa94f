// The page: asks the server twice a second what its engine did, and shows it.

import { NeedsKey, download, json, saveKey } from "./api.js";
import { drawBlocks, drawFirstTokens, drawGaps } from "./charts.js";
import { Chat } from "./chat.js";
import { Steps } from "./steps.js";
import { element, quantile, time } from "./text.js";

const PERIOD = 500, SPEED_SECONDS = 3, NUM_GAPS = 200;
let created = null;
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((found) => [found.id.replace(/-/g, "_"), found]));

const steps = new Steps(page.steps, page.detail, page.follow, async (request) => {
  try {
    return (await json(`/insight/requests/${request}`)).words;
  } catch (error) {
    return [error.message];
  }
});
new Chat(page, (error) => {
  if (error instanceof NeedsKey) askForKey();
});

function askForKey() {
  page.key_form.hidden = false;
  page.key.focus();
}

function setState(text, className) {
  page.state.textContent = text;
  page.state.className = `state ${className}`;
}

// Tokens that came out in the last seconds of work: a decode each, and one for each prompt that was completed.
function speed(now) {
  const recent = steps.steps.filter((step) => step.started > now - SPEED_SECONDS);
  return recent.reduce((sum, step) => sum + step.num_decodes, 0) / SPEED_SECONDS;
}

function showRequests(feed) {
  page.rows_note.textContent = `${feed.num_running} of ${feed.limits.max_num_seqs} rows`;
  const lines = feed.requests.map((request) => {
    const line = element("div", "request");
    const bar = element("div", "bar"), prompt = element("i", "prompt"), output = element("i", "output");
    const whole = request.num_prompt + request.max_tokens;
    prompt.style.width = `${(100 * (request.num_output ? request.num_prompt : request.num_computed)) / whole}%`;
    output.style.width = `${(100 * request.num_output) / whole}%`;
    bar.append(prompt, output);
    const figures = `${request.num_prompt} + ${request.num_output}`;
    line.append(element("span", "", `#${request.request}`), element("span", "muted", request.state), bar, element("span", "", figures));
    return line;
  });
  page.requests.replaceChildren(...(lines.length ? lines : [element("span", "muted", "no request runs")]));
}

function showBlocks(blocks) {
  drawBlocks(page.blocks, blocks.cells);
  for (const [name, num] of Object.entries(blocks.num)) page[name].textContent = `${num.toLocaleString("en")} ${name}`;
}

function showCharts(feed) {
  const first = [...feed.ended, ...feed.requests].filter((request) => request.ttft !== null);
  drawFirstTokens(page.ttft, first);
  if (first.length) page.ttft_note.textContent = `median ${time(quantile(first.map((request) => request.ttft), 0.5))}`;
  const gaps = steps.steps.filter((step) => step.num_decodes).slice(-NUM_GAPS);
  drawGaps(page.itl, gaps);
  if (!gaps.length) return;
  const values = gaps.map((step) => step.seconds);
  page.itl_note.textContent = `median ${time(quantile(values, 0.5))}, p99 ${time(quantile(values, 0.99))}`;
}

async function look() {
  try {
    const feed = await json(`/insight/feed?since=${steps.last()}`);
    page.key_form.hidden = true;
    page.model.textContent = feed.model;
    if (feed.created !== created) steps.clear(); // another server, whose steps have other numbers
    created = feed.created;
    steps.add(feed.steps);
    page.speed.textContent = speed(feed.now).toFixed(speed(feed.now) < 10 ? 1 : 0);
    page.running.textContent = feed.num_running;
    page.waiting.textContent = feed.num_waiting;
    showRequests(feed);
    showBlocks(feed.blocks);
    showCharts(feed);
    setState(feed.num_running || feed.num_waiting ? "working" : "idle", "ok");
  } catch (error) {
    if (error instanceof NeedsKey) {
      setState("locked", "bad");
      askForKey();
      return; // the form starts it again
    }
    setState("no connection", "bad");
  }
  setTimeout(look, document.hidden ? 4 * PERIOD : PERIOD);
}

page.key_form.addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey(page.key.value);
  page.key.value = "";
  look();
});
for (const button of document.querySelectorAll("[data-download]")) {
  button.addEventListener("click", () => download(button.dataset.download).catch((error) => setState(error.message, "bad")));
}
window.addEventListener("resize", () => steps.draw());
look();
