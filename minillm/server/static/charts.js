// TTFT of the last requests as dots, the gap between tokens step by step as a line, and the map of KV blocks.

import { prepare, themed } from "./canvas.js";
import { time } from "./text.js";

const LEFT = 46, PAD = 8;

// points: [x, y]; y begins at 0.
function plot(canvas, points, isLine) {
  const { context, width, height } = prepare(canvas);
  context.fillStyle = themed("muted");
  if (!points.length) {
    context.fillText("nothing yet", LEFT, height / 2);
    return;
  }
  const xs = points.map((point) => point[0]);
  const low = Math.min(...xs), high = Math.max(...xs, low + 1e-9);
  const most = Math.max(...points.map((point) => point[1]), 1e-9) * 1.1;
  const x = (value) => LEFT + ((width - LEFT - PAD) * (value - low)) / (high - low);
  const y = (value) => height - PAD - ((height - 2 * PAD) * value) / most;
  context.strokeStyle = themed("line");
  context.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    context.beginPath();
    context.moveTo(LEFT, y(most * share));
    context.lineTo(width - PAD, y(most * share));
    context.stroke();
    context.fillText(share ? time(most * share) : "0", 0, y(most * share) + 4);
  }
  context.strokeStyle = context.fillStyle = themed("decode");
  context.lineWidth = 1.5;
  context.beginPath();
  for (const [i, point] of points.entries()) {
    if (isLine) context[i ? "lineTo" : "moveTo"](x(point[0]), y(point[1]));
    else {
      context.moveTo(x(point[0]) + 3, y(point[1]));
      context.arc(x(point[0]), y(point[1]), 3, 0, 7);
    }
  }
  context[isLine ? "stroke" : "fill"]();
}

export function drawFirstTokens(canvas, ended) {
  plot(canvas, ended.map((request, i) => [i, request.ttft]), false);
}

export function drawGaps(canvas, steps) {
  plot(canvas, steps.map((step) => [step.started, step.seconds]), true);
}

export function drawBlocks(canvas, cells) {
  const { context, width, height } = prepare(canvas);
  const fills = ["free", "cached", "used", "shared"].map(themed);
  let columns = Math.ceil(Math.sqrt((cells.length * width) / height));
  while (Math.ceil(cells.length / columns) * (width / columns) > height) columns += 1;
  const side = width / columns;
  for (let i = 0; i < cells.length; i += 1) {
    context.fillStyle = fills[cells[i]];
    const inner = Math.max(side - 1, 0.75 * side);
    context.fillRect((i % columns) * side, Math.floor(i / columns) * side, inner, inner);
  }
}
