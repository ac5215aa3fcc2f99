// The time between tokens as a strip of bars; the colour is the kind of the step.

const strips = [];
const SPACE = 14; // pixels above the bars, for the scale

export class Strip {
  constructor(canvas) {
    this.canvas = canvas;
    this.onPoint = () => {};
    this.clear();
    strips.push(this);
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.onPoint(null));
  }

  clear() {
    this.bars = []; // { ms, kind, token }
    this.marked = null;
    this.p95 = 0;
    this.canvas.setAttribute("aria-label", "Time between tokens: no answer yet");
  }

  add(bars, p95) {
    this.bars.push(...bars);
    this.p95 = p95;
    drawAll(); // the scale is that of both columns
  }

  describe(summary) {
    const ms = (value) => (value === null ? "unknown" : `${value.toFixed(1)} milliseconds`);
    this.canvas.setAttribute(
      "aria-label",
      `Time between tokens: half within ${ms(summary.p50_ms)}, 95 % within ${ms(summary.p95_ms)}; ` +
        `${summary.lora} of ${summary.tokens} tokens came of LoRA steps`,
    );
  }

  layout() {
    const width = this.canvas.clientWidth;
    const pitch = Math.max(2, Math.min(9, width / Math.max(this.bars.length, 1)));
    const first = Math.max(0, this.bars.length - Math.floor(width / pitch));
    return { pitch, first };
  }

  point(x) {
    const { pitch, first } = this.layout();
    const bar = this.bars[first + Math.floor(x / pitch)];
    this.onPoint(bar ? bar.token : null);
  }

  mark(token) {
    this.marked = token;
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name);
    pen.fillStyle = colour("--line");
    pen.fillRect(0, height - 1, width, 1);
    if (!this.bars.length) return;
    const scale = Math.max(...strips.map((strip) => strip.p95)) * 1.25 || 1;
    pen.fillStyle = colour("--muted");
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(`${scale.toFixed(scale < 10 ? 1 : 0)} ms`, 0, 10);
    const { pitch, first } = this.layout();
    const thickness = pitch > 4 ? pitch - 1.5 : pitch > 2.5 ? pitch - 1 : pitch - 0.5;
    this.bars.slice(first).forEach((bar, n) => {
      const tall = Math.max(1.5, Math.min(1, bar.ms / scale) * (height - SPACE - 1));
      pen.fillStyle = colour(
        bar.token === this.marked ? "--ink" : bar.kind === "L" ? "--lora" : "--full",
      );
      pen.beginPath();
      const round = Math.min(2, thickness / 2);
      pen.roundRect(n * pitch, height - 1 - tall, thickness, tall, [round, round, 0, 0]);
      pen.fill();
    });
  }
}

function drawAll() {
  strips.forEach((strip) => strip.draw());
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
