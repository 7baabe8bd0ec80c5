// The strip of figures, and the picture of the experts in memory.

const OFTEN_MS = 1000;
const SELDOM_MS = 5000;

const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
  return `${count.toFixed(count < 10 && unit ? 1 : 0)} ${units[unit]}`;
};

const figures = {
  isBusy: false,
  before: null,
  timer: 0,

  async refresh() {
    clearTimeout(this.timer);
    try {
      if (!document.hidden) this.show(await get("stats?experts=1"));
    } catch {
      // the server loads, stops, or wants a key: the conversation says so
    }
    this.timer = setTimeout(() => this.refresh(), this.isBusy ? OFTEN_MS : SELDOM_MS);
  },

  show({ engine, model, experts }) {
    const now = { at: performance.now(), tokens: engine.new_tokens };
    const since = this.before;
    if (since && now.tokens > since.tokens && now.at - since.at < 2 * OFTEN_MS) {
      field("figure-speed").textContent = `${((now.tokens - since.tokens) / ((now.at - since.at) / 1000)).toFixed(1)} tok/s`;
    } else if (!engine.running) field("figure-speed").textContent = "–";
    this.before = now;
    field("figure-kv").textContent = `${bytes(engine.kv_used_bytes + engine.kv_kept_bytes)} of ${bytes(engine.kv_budget_bytes)}`;
    field("figure-waiting").textContent = `${engine.waiting} (${engine.running} run)`;
    if (!model) return;
    const rate = model.decode.hit_rate;
    field("figure-hits").textContent = rate === null ? "–" : `${(100 * rate).toFixed(1)} %`;
    field("figure-memory").textContent = `${bytes(model.memory.device_bytes)} of ${bytes(model.memory.all_experts_bytes)}`;
    field("figure-disk").textContent = bytes(model.prefill.bytes_from_disk + model.decode.bytes_from_disk);
    if (experts) this.draw(experts);
  },

  // One pixel an expert: rows of "0" and "1", a layer each.
  draw(layers) {
    const canvas = field("experts-picture");
    const across = Math.max(...layers.map((layer) => layer.length));
    canvas.width = across;
    canvas.height = layers.length;
    const style = getComputedStyle(document.documentElement);
    const context = canvas.getContext("2d");
    let resident = 0;
    let all = 0;
    layers.forEach((layer, y) => [...layer].forEach((present, x) => {
      const isHere = Number(present) > 0;
      resident += isHere;
      all += 1;
      context.fillStyle = style.getPropertyValue(isHere ? "--accent" : "--panel");
      context.fillRect(x, y, 1, 1);
    }));
    canvas.style.width = `${Math.min(across * 8, 256)}px`;
    const told = `${resident} of ${all} experts in memory`;
    canvas.setAttribute("aria-label", `${told}, in ${layers.length} layers`);
    field("experts-caption").textContent = told;
  },
};
