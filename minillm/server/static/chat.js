// The chat: messages, settings, one answer at a time, and what it cost.

import { events, json } from "./api.js";
import { count, element, time } from "./text.js";

const FIELDS = { temperature: Number, top_p: Number, max_tokens: Number, seed: Number };

export class Chat {
  constructor(page, onError) {
    this.page = page;
    this.onError = onError;
    this.said = [];
    this.answering = null;
    page.ask.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.answering) this.answering.abort();
      else this.ask(page.prompt.value.trim());
    });
    page.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.answering) this.ask(page.prompt.value.trim());
    });
    page.clear.addEventListener("click", () => {
      this.answering?.abort();
      this.said = [];
      page.messages.replaceChildren();
    });
  }

  show(className, text) {
    const made = element("div", `message ${className}`, text);
    this.page.messages.append(made);
    made.scrollIntoView({ block: "end" });
    return made;
  }

  body() {
    const { page } = this;
    const system = page.system.value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.said];
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    for (const [name, convert] of Object.entries(FIELDS)) {
      if (page[name].value !== "") body[name] = convert(page[name].value);
    }
    return body;
  }

  async ask(text) {
    if (!text) return;
    const said = this.said;
    said.push({ role: "user", content: text });
    const asked = this.show("user", text);
    const answer = this.show("assistant", "");
    this.page.prompt.value = "";
    this.page.send.textContent = "Stop";
    this.answering = new AbortController();
    let id = null, timings = null, isStopped = false;
    try {
      for await (const chunk of events("/v1/chat/completions", this.body(), this.answering.signal)) {
        if (chunk.error) throw new Error(chunk.error.message);
        id = chunk.id;
        timings = chunk.timings || timings;
        answer.textContent += chunk.choices[0]?.delta?.content || "";
        answer.scrollIntoView({ block: "end" });
      }
    } catch (error) {
      isStopped = error.name === "AbortError";
      if (!isStopped) {
        answer.classList.add("error");
        answer.textContent = error.message;
        said.pop();
        asked.classList.add("muted");
        this.onError(error);
      }
    }
    this.answering = null;
    this.page.send.textContent = "Send";
    if (answer.classList.contains("error")) return;
    said.push({ role: "assistant", content: answer.textContent });
    if (timings) this.showTimings(id, timings);
    else if (isStopped) this.show("timings", "Stopped.");
  }

  showTimings(id, timings) {
    const words = [
      `first token ${time(timings.ttft_seconds)}`,
      `${count(timings.output_tokens, "token")} in ${time(timings.total_seconds)}`,
      `${count(timings.prompt_tokens, "prompt token")}, ${timings.cached_tokens} cached`,
      count(timings.chunks, "chunk"),
    ];
    const line = this.show("timings", words.join(" · ") + " ");
    const why = element("button", "link", "why?");
    why.addEventListener("click", async () => {
      why.disabled = true;
      try {
        const told = await json(`/v1/requests/${encodeURIComponent(id)}/explain`);
        line.append(...told.completions[0].words.map((text) => element("p", "", text)));
      } catch (error) {
        line.append(element("p", "", error.message));
      }
      line.scrollIntoView({ block: "end" });
    });
    line.append(why);
    line.scrollIntoView({ block: "end" });
  }
}
