// The server's endpoints. The key, if there is one, stays in this tab.

export class NeedsKey extends Error {}

export function saveKey(key) {
  sessionStorage.setItem("key", key);
}

export async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) throw new NeedsKey("This server needs its key.");
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message || `the server answered ${response.status}`);
  }
  return response;
}

export async function json(path) {
  return (await call(path)).json();
}

// The objects of a stream of server-sent events.
export async function* events(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel();
  }
}

export async function download(path) {
  const blob = await (await call(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `minillm-${path.slice(1)}${path === "/metrics" ? ".txt" : ".json"}`;
  link.click();
  URL.revokeObjectURL(link.href);
}
