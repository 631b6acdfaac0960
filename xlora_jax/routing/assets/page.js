"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const report = data.report, experts = report.experts, layers = report.layers, N = experts.length, L = layers.length;
  const page = document.getElementById("page"), tip = document.getElementById("tip"), root = document.documentElement;
  const SVG = "http://www.w3.org/2000/svg";

  // Elements are made from data by these two only: text is set as text, never as markup.
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
      else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
      else if (name === "tip") node.tipOf = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(3)) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const sv = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const percent = (x, digits) => (x * 100).toFixed(digits ?? (x > 0 && x < 0.0995 ? 1 : 0)) + "%";
  const fixed = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  const whole = (x) => Math.round(x).toLocaleString("en-US");
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const mean = (list) => sum(list) / Math.max(list.length, 1);
  const columnMeans = (rows) => experts.map((_, e) => mean(rows.map((row) => row[e])));
  const color = (e) => `color-mix(in oklab, ${data.colors[e % data.colors.length]}, white var(--lift))`;
  // Dark or light text, whichever reads better on the color as shown.
  function on(e) {
    const [r, g, b] = [1, 3, 5].map((i) => {
      const v = parseInt(data.colors[e % data.colors.length].slice(i, i + 2), 16) / 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#14171a" : `light-dark(#ffffff, #14171a)`;
  }
  const swatch = (e) => el("span", { class: "sw", style: { "--c": color(e) }, "aria-hidden": "true" });
  const chip = (e) => el("span", { class: "chip" }, swatch(e), experts[e]);
  const ranked = (weights) => weights.map((w, e) => [w, e]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const shorten = (name, most = 14) => (name.length > most ? name.slice(0, most - 1) + "…" : name);

  // "model.layers.3.self_attn.q_proj" is shown as "3 q_proj".
  function shortLayer(name) {
    const parts = name.split(/[./]/), number = parts.find((part) => /^\d+$/.test(part));
    return parts.length < 2 ? name : (number === undefined ? "" : number + " ") + parts[parts.length - 1];
  }
  const blockOf = (name) => (name.match(/(?:^|[./_])(\d+)(?:[./]|$)/) || [])[1];

  // The tooltip, for the mouse and for the keyboard.
  function showTip(node, content) {
    tip.replaceChildren(...[content].flat());
    tip.hidden = false;
    const box = node.getBoundingClientRect(), own = tip.getBoundingClientRect(), edge = 8;
    let left = Math.min(Math.max(box.left + box.width / 2 - own.width / 2, edge), innerWidth - own.width - edge);
    let top = box.top - own.height - 10;
    if (top < edge) top = Math.min(box.bottom + 10, innerHeight - own.height - edge);
    tip.style.left = Math.max(left, edge) + "px";
    tip.style.top = Math.max(top, edge) + "px";
  }
  const hideTip = () => { tip.hidden = true; };
  document.addEventListener("mouseover", (event) => {
    let node = event.target;
    while (node && node !== document && !node.tipOf) node = node.parentNode;
    if (node && node.tipOf) showTip(node, node.tipOf());
    else if (!document.activeElement || !document.activeElement.tipOf) hideTip();
  });
  document.addEventListener("scroll", hideTip, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  const line = (title, ...more) => [el("div", { class: "what" }, title), ...more.map((m) => el("div", { class: "sub" }, m))];
  const weightRows = (weights) => el("div", { class: "w" }, ranked(weights).map(([w, e]) => [
    chip(e),
    el("span", { class: "track" }, el("span", { class: "fill", style: { "--c": color(e), width: Math.min(w, 1) * 100 + "%" } })),
    el("span", { class: "n" }, percent(w)),
  ]));

  function panel(title, text, body, controls) {
    return el("section", {}, el("div", { class: "head" }, el("div", {}, el("h2", {}, title), text && el("p", {}, text)), controls), body);
  }
  function choices(names, chosen, pick, label) {
    const buttons = names.map((name, i) => el("button", {
      type: "button", "aria-pressed": String(i === chosen), title: name.length > 30 ? name : null,
      on: { click() { buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(j === i))); pick(i); } },
    }, name));
    return el("div", { class: "seg", role: "group", "aria-label": label }, buttons);
  }
  const numbers = (header, rows) => el("details", {}, el("summary", {}, "Numbers"), el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Numbers" }, el("table", {},
    el("thead", {}, el("tr", {}, header.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell))))))));

  const legend = () => el("ul", { class: "legend", "aria-label": "Experts" }, experts.map((name, e) => el("li", {}, swatch(e), name)));
  const names = Object.keys(report.texts), everything = report.all;
  const sets = names.map((name) => [name, report.texts[name]]);
  const shown = sets.length > 1 ? [["all texts", everything], ...sets] : sets;
  const leaderOf = (entry) => ranked(columnMeans(entry.top1))[0];

  // Header.
  function themeButton() {
    const order = ["auto", "light", "dark"];
    const system = matchMedia("(prefers-color-scheme: dark)");
    let theme = "auto";
    try { theme = localStorage.getItem("xlora-jax-theme") || "auto"; } catch { /* a page without storage */ }
    if (!order.includes(theme)) theme = "auto";
    const button = el("button", { type: "button", class: "toggle", id: "theme", on: { click() {
      theme = order[(order.indexOf(theme) + 1) % 3];
      try { localStorage.setItem("xlora-jax-theme", theme); } catch { /* as above */ }
      apply();
    } } });
    function apply() {
      root.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
      button.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
      button.setAttribute("aria-label", "Theme: " + theme);
    }
    system.addEventListener("change", apply);
    addEventListener("beforeprint", () => { root.dataset.theme = "light"; });
    addEventListener("afterprint", apply);
    apply();
    return button;
  }

  function findings() {
    const parts = [];
    const own = sets.map(([name, entry]) => [name, leaderOf(entry)]);
    if (sets.length > 1) {
      const specialists = new Set(own.map(([, [, e]]) => e)).size;
      parts.push(`${sets.length} texts have ${specialists === 1 ? "one and the same leading expert" : specialists + " different leading experts"}. `);
    }
    const best = own.slice().sort((a, b) => b[1][0] - a[1][0])[0];
    if (best) parts.push(el("b", {}, experts[best[1][1]]), " leads on ", el("b", {}, percent(best[1][0])), " of the tokens of ", el("b", {}, best[0]), ". ");
    const gain = everything.base_loss - everything.loss;
    parts.push(gain > 0
      ? ["With the experts the loss falls from ", el("b", {}, fixed(everything.base_loss)), " to ", el("b", {}, fixed(everything.loss)), " nats per token."]
      : ["The experts do not lower the loss: ", el("b", {}, fixed(everything.base_loss)), " without, ", el("b", {}, fixed(everything.loss)), " with them."]);
    return el("p", { class: "lead" }, parts);
  }
  function tile(key, value, detail, kind) {
    return el("div", { class: "tile" }, el("div", { class: "k" }, key), el("div", { class: "v" }, value), el("div", { class: "d " + (kind || "") }, detail));
  }
  function tiles() {
    const change = everything.loss / everything.base_loss - 1;
    const [share, e] = ranked(columnMeans(everything.mean_shares))[0];
    const perToken = mean(everything.experts_per_token), inUse = mean(everything.experts_in_use);
    return el("div", { class: "tiles" },
      tile("Loss with experts", fixed(everything.loss), (change <= 0 ? "−" : "+") + percent(Math.abs(change)) + " against the base", change <= 0 ? "good" : "bad"),
      tile("Experts per token", perToken.toFixed(1), `effective, of ${N}`),
      tile("Experts in use", inUse.toFixed(1), "effective, over all texts"),
      tile("Most used", el("span", { class: "chip" + (experts[e].length > 12 ? " long" : "") }, swatch(e), shorten(experts[e], 40)), percent(share) + " of all gates"),
      tile("Tokens", whole(everything.tokens), `${sets.length} ${sets.length === 1 ? "text" : "texts"}, ${L} ${L === 1 ? "gate for all layers" : "layers"}`));
  }

  // Tokens, each in the color of its leading expert.
  function decode(sample) {
    const bytes = atob(sample.shares), T = sample.tokens.length;
    const at = (t, l, e) => bytes.charCodeAt((t * L + l) * N + e) / 255;
    const cache = new Map();
    return (t, layer) => {
      const key = t * (L + 1) + layer;
      if (!cache.has(key)) {
        const all = layer < L ? [layer] : layers.map((_, l) => l);
        cache.set(key, experts.map((_, e) => mean(all.map((l) => at(t, l, e)))));
      }
      return t < T ? cache.get(key) : null;
    };
  }
  function tokenView(samples) {
    let sample = 0, layer = L, weights = null, spans = [], active = 0;
    const box = el("div", { class: "tokens", role: "group", "aria-label": "Tokens; arrow keys move from token to token" });
    const count = el("span", { class: "count", role: "status" });
    const layerName = () => (layer < L ? shortLayer(layers[layer]) : L > 1 ? "mean of all layers" : "all layers");
    const partOf = (t) => samples[sample].parts.filter((part) => part.start <= t).pop() || { kind: "text" };
    function strip(t) {
      if (L < 2) return null;
      const w = 300 / L;
      return sv("svg", { class: "strip", viewBox: "0 0 300 34", preserveAspectRatio: "none", "aria-hidden": "true" }, layers.map((_, l) => {
        let y = 0;
        return weights(t, l).map((share, e) => {
          const rect = sv("rect", { x: l * w, width: w + 0.3, y, height: share * 34, opacity: layer === L || layer === l ? 1 : 0.3, style: { fill: color(e) } });
          y += share * 34;
          return rect;
        });
      }));
    }
    function tipOf(t) {
      const text = samples[sample].tokens[t];
      return [
        el("div", { class: "what" }, el("code", {}, text === "" ? "part of a character" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥")), " ",
          el("span", { class: "sub" }, `token ${t + 1}, ${partOf(t).kind}, ${layerName()}`)),
        weightRows(weights(t, layer)), strip(t),
        L > 1 ? el("div", { class: "sub" }, `from layer 1 (left) to ${L} (right)`) : null,
      ].filter(Boolean);
    }
    function paint() {
      spans.forEach((span, t) => {
        const [[share, e]] = ranked(weights(t, layer));
        // Even shares give a pale color, a single expert a full one.
        const strength = N > 1 ? Math.max((share * N - 1) / (N - 1), 0) : 1;
        span.style.setProperty("--c", share > 0 ? color(e) : "transparent");
        span.style.setProperty("--s", (8 + 58 * strength).toFixed(0) + "%");
        span.dataset.expert = share > 0 ? e : "";
      });
    }
    function describe(t) {
      return `${samples[sample].tokens[t] || "part of a character"}: ` + ranked(weights(t, layer)).map(([w, e]) => `${experts[e]} ${percent(w)}`).join(", ");
    }
    function move(t) {
      spans[active].tabIndex = -1;
      active = Math.min(Math.max(t, 0), spans.length - 1);
      spans[active].tabIndex = 0;
      spans[active].setAttribute("aria-label", describe(active));
      spans[active].focus();
    }
    function fillBox() {
      weights = decode(samples[sample]);
      const starts = new Map(samples[sample].parts.map((part) => [part.start, part.kind]));
      active = 0;
      spans = samples[sample].tokens.map((text, t) => {
        const pieces = text === "" ? [el("span", { class: "nl" }, "·")] : text.split(/(\n)/).filter((p) => p).map((p) => p === "\n" ? [el("span", { class: "nl", "aria-hidden": "true" }, "↵"), "\n"] : p);
        return el("span", { class: "t" + (["generated", "answer"].includes(partOf(t).kind) ? " new" : ""), tabindex: t ? -1 : 0, "data-token": t, tip: () => tipOf(t), role: "img",
          on: { focus(event) { event.target.setAttribute("aria-label", describe(t)); showTip(event.target, tipOf(t)); }, blur: hideTip, click() { move(t); } } }, pieces);
      });
      const several = samples[sample].parts.length > 1 || samples[sample].parts.some((part) => part.kind !== "text");
      box.replaceChildren(...spans.flatMap((span, t) => several && starts.has(t)
        ? [el("span", { class: "part" + (["generated", "answer"].includes(starts.get(t)) ? " new" : "") }, starts.get(t)), span] : [span]));
      box.scrollTop = 0;
      paint();
      find();
    }
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: active + 1, ArrowLeft: active - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (step === undefined || !event.target.classList.contains("t")) return;
      event.preventDefault();
      move(step);
    });
    const search = el("input", { type: "search", id: "search", placeholder: "Find in the text", "aria-label": "Find in the text", on: { input: find } });
    function find() {
      const query = search.value.toLowerCase();
      spans.forEach((span) => span.classList.remove("hit", "dim"));
      if (!query) { count.textContent = ""; return; }
      const starts = [];
      let text = "";
      for (const token of samples[sample].tokens) { starts.push(text.length); text += token.toLowerCase(); }
      let found = 0, first = null;
      for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
        found += 1;
        spans.forEach((span, t) => {
          const end = t + 1 < starts.length ? starts[t + 1] : text.length;
          if (starts[t] < at + query.length && end > at) { span.classList.add("hit"); first = first ?? span; }
        });
      }
      spans.forEach((span) => span.classList.toggle("dim", found > 0 && !span.classList.contains("hit")));
      count.textContent = found === 1 ? "1 match" : found + " matches";
      if (first) box.scrollTop = Math.max(first.offsetTop - box.offsetTop - 60, 0);
    }
    const select = el("select", { id: "layer", on: { change() { layer = Number(select.value); paint(); } } },
      el("option", { value: L }, L > 1 ? `mean of all ${L} layers` : "all layers"), L > 1 ? layers.map((name, l) => el("option", { value: l, title: name }, shortLayer(name))) : null);
    fillBox();
    const tabs = samples.length > 1 ? choices(samples.map((s) => shorten(s.name, 34)), 0, (i) => { sample = i; fillBox(); }, "Text") : null;
    return [
      el("div", { class: "controls" }, tabs, L > 1 ? el("label", {}, "Layer", select) : null, search, count),
      box,
      el("p", { class: "hint" }, "Color: the leading expert. Strength: how far it leads. Point at a token, or use Tab and the arrow keys, for all weights."),
    ];
  }

  // Usage of each expert.
  const narrow = innerWidth < 620;
  const readable = (e, w) => w < (narrow ? 0.13 : 0.07) ? "" : w < (narrow ? 0.42 : 0.2) ? percent(w, 0) : `${shorten(experts[e])} ${percent(w, 0)}`;
  function usage() {
    const kinds = [["Mean gate", "mean_shares", "share of the gates"], ["Leading expert", "top1", "share of tokens led"]];
    if (report.model.top_k) kinds.push(["Selected", "selected", "share of tokens that select it"]);
    const grid = el("div", { class: "usage" });
    function draw(kind) {
      grid.replaceChildren(...shown.flatMap(([name, entry]) => {
        const weights = columnMeans(entry[kinds[kind][1]]), total = sum(weights) || 1;
        return [
          el("div", { class: "name" }, name, el("small", {}, whole(entry.tokens) + " tokens")),
          el("div", { class: "stack", role: "img", "aria-label": `${name}: ` + experts.map((x, e) => `${x} ${percent(weights[e])}`).join(", ") },
            weights.map((w, e) => el("span", { class: readable(e, w) ? "" : "narrow", style: { "--c": color(e), "--on": on(e), flex: `${w / total} 0 0%` }, tip: () => line(chip(e), `${percent(w, 1)}, ${kinds[kind][2]}`, name) }, readable(e, w)))),
        ];
      }));
    }
    draw(0);
    return panel("Usage", "How much of each text goes to each expert, over all layers.",
      [grid, numbers(["text", ...experts], shown.map(([name, entry]) => [name, ...columnMeans(entry.mean_shares).map((w) => percent(w, 1))]))],
      choices(kinds.map((k) => k[0]), 0, draw, "Measure"));
  }

  // Heat maps.
  const ramp = () => el("span", { class: "scale" }, "0", el("span", { class: "ramp" }), "1");
  function heat(values, rowNames, columns, tipFor, { cell = 22, rowHeight, label = shortLayer, left = widest(rowNames, label), colored = false } = {}) {
    const many = rowHeight === undefined && rowNames.length > 60;
    const h = rowHeight || Math.max(2.6, Math.min(18, 440 / rowNames.length)), gap = many ? 1.5 : 4;
    let y = 0, last = null;
    const begins = rowNames.map((name, r) => r === 0 || blockOf(name) !== blockOf(rowNames[r - 1]));
    const tops = rowNames.map((name) => {
      const block = blockOf(name);
      if (last !== null && block !== last && rowHeight === undefined) y += gap;
      last = block;
      const top = y;
      y += h;
      return top;
    });
    const every = Math.max(1, Math.ceil(11 / h));
    // Room for the names, which are turned by 42 degrees.
    const lengths = columns.map((c) => shorten(c).length * 6.3 + 8);
    const head = 18 + Math.max(...lengths) * 0.67;
    const width = left + Math.max(columns.length * cell, ...lengths.map((l, c) => (c + 0.5) * cell + l * 0.75)) + 2;
    return sv("svg", { width, height: head + y + 4, viewBox: `0 ${-head} ${width} ${head + y + 4}` },
      columns.map((name, c) => sv("g", {}, colored ? sv("rect", { x: left + c * cell + 2, y: -9, width: cell - 5, height: 5, rx: 2.5, style: { fill: color(c) } }) : null,
        sv("text", { x: left + (c + 0.5) * cell, y: -13, transform: `rotate(-42 ${left + (c + 0.5) * cell} -13)`, class: "strong" }, shorten(name)))),
      rowNames.map((name, r) => [
        (many ? begins[r] : r % every === 0) ? sv("text", { x: left - 7, y: tops[r] + h / 2 + 3.8, "text-anchor": "end" }, shorten(label(name), 12)) : null,
        columns.map((_, c) => sv("rect", { class: "cell", x: left + c * cell, y: tops[r], width: cell - 1.5, height: h - (h > 8 ? 1.5 : 0.4), rx: h > 10 ? 3 : 1, style: { "--v": (Math.min(Math.max(values[r][c], 0), 1) * 100).toFixed(1) + "%" }, tip: () => tipFor(r, c) })),
      ]));
  }
  const widest = (names, label = shortLayer) => 12 + Math.max(...names.map((name) => shorten(label(name), 12).length)) * 5.9;
  function gateMaps() {
    const wide = N > 12 ? 14 : N > 6 ? 18 : 23;
    if (L === 1) {
      const gates = shown.map(([, entry]) => entry.mean_gates[0]);
      const map = heat(gates, shown.map((s) => s[0]), experts, (t, e) => line(chip(e), `mean gate ${fixed(gates[t][e])}`, shown[t][0]), { cell: Math.max(18, Math.min(56, 420 / N)), rowHeight: 34, label: (name) => name, colored: true });
      return panel("Gate by text and expert", "Mean gate of each expert. All layers share their gates.", el("div", { class: "maps" }, el("figure", {}, map)), ramp());
    }
    const maps = shown.map(([name, entry]) => el("figure", { role: "img", "aria-label": `Mean gate by layer and expert, ${name}` }, el("h3", {}, name),
      heat(entry.mean_gates, layers, experts, (l, e) => [...line(chip(e), `mean gate ${fixed(entry.mean_gates[l][e])}`, layers[l], name)], { cell: wide, colored: true })));
    const rows = shown.flatMap(([name, entry]) => layers.map((layer, l) => [name, layer, ...entry.mean_gates[l].map((g) => fixed(g))]));
    return panel("Gate by layer and expert", "Mean gate of each expert in each adapted layer, from the first layer (top) to the last.", [el("div", { class: "maps" }, maps), numbers(["text", "layer", ...experts], rows)], ramp());
  }

  // Line charts.
  const dashes = ["", "6 4", "2 4", "9 4 2 4", "1 5"];
  function styleOf(name, i) {
    const e = experts.indexOf(name);
    return e >= 0 ? { color: color(e), dash: "" } : { color: "var(--soft)", dash: dashes[i % dashes.length] };
  }
  function lines(series, xs, { max = 1, min = 0, height = 220, ticks = 4, xlabel, format = (v) => v.toFixed(2), xname = (i) => xs[i], log = false } = {}) {
    const W = narrow ? 350 : 520, left = 38, right = 92, top = 10, bottom = 30, H = height;
    const low = xs[0], high = xs[xs.length - 1], span = high - low || 1;
    const X = (x) => left + (W - left - right) * (x - low) / span, Y = (v) => top + (H - top - bottom) * (1 - (v - min) / (max - min || 1));
    const marks = Array.from({ length: ticks + 1 }, (_, i) => min + (max - min) * i / ticks);
    // The names at the ends of the lines keep a distance from each other.
    const ends = series.map((s, i) => ({ i, y: Y(s.values[s.values.length - 1]) })).sort((a, b) => a.y - b.y);
    ends.forEach((end, k) => { if (k) end.y = Math.max(end.y, ends[k - 1].y + 13); });
    const over = ends.length ? Math.max(ends[ends.length - 1].y - (H - bottom + 4), 0) : 0;
    ends.forEach((end) => { end.y -= over; });
    return sv("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", role: "img", "aria-label": xlabel },
      marks.map((v) => [sv("line", { class: "axis", x1: left, x2: W - right, y1: Y(v), y2: Y(v) }), sv("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end" }, format(v))]),
      sv("text", { x: left, y: H - 8 }, xname(0)), sv("text", { x: W - right, y: H - 8, "text-anchor": "end" }, xname(xs.length - 1)),
      sv("text", { x: (left + W - right) / 2, y: H - 8, "text-anchor": "middle", class: "strong" }, xlabel),
      series.map((s) => sv("path", { class: "series" + (s.all ? " all" : ""), style: { "--c": s.color }, "stroke-dasharray": s.dash,
        d: s.values.map((v, i) => `${i ? "L" : "M"}${X((s.xs || xs)[i]).toFixed(1)},${Y(v).toFixed(1)}`).join("") })),
      series.map((s) => s.values.length <= 40 ? s.values.map((v, i) => sv("circle", { class: "dot", cx: X((s.xs || xs)[i]), cy: Y(v), r: s.values.length > 1 ? 2.6 : 4, style: { "--c": s.all ? "var(--ink)" : s.color } })) : null),
      ends.map(({ i, y }) => [
        sv("line", { x1: W - right + 6, x2: W - right + 16, y1: y, y2: y, class: "series" + (series[i].all ? " all" : ""), style: { "--c": series[i].color }, "stroke-dasharray": series[i].dash }),
        sv("text", { x: W - right + 20, y: y + 4, class: series[i].all ? "strong" : "" }, shorten(series[i].name, 12))]),
      xs.length <= 400 ? xs.map((x, i) => sv("rect", { class: "hover", x: X(x) - (W - left - right) / xs.length / 2, width: Math.max((W - left - right) / xs.length, 4), y: top, height: H - top - bottom,
        tip: () => [el("div", { class: "what" }, xname(i)), el("div", { class: "w", style: { "grid-template-columns": "1fr max-content" } }, series.filter((s) => !s.xs).map((s) => [el("span", {}, s.name), el("span", { class: "n" }, format(s.values[i]))]))] })) : null);
  }
  function bars(rows, format, top) {
    const most = top || Math.max(...rows.map((r) => r.value), 1e-9);
    return el("div", { class: "rows" }, rows.map((r) => r.gap ? el("div", { class: "gap" }, r.gap) : [
      el("span", { class: "lab" + (r.me ? " me" : "") }, r.e === undefined ? null : swatch(r.e), r.name),
      el("span", { class: "track" }, el("span", { class: "fill", style: { "--c": r.color || "var(--faint)", width: Math.max(r.value / most, 0) * 100 + "%" } })),
      el("span", { class: "num " + (r.kind || "") }, r.label || format(r.value)),
    ]));
  }
  function byLayer(key, title, text) {
    const series = shown.map(([name, entry], i) => ({ name, values: entry[key], all: name === "all texts" && shown.length > 1, ...styleOf(name, i) }));
    const body = L > 1
      ? lines(series, layers.map((_, l) => l), { max: Math.min(1, Math.ceil(Math.max(...series.flatMap((s) => s.values)) * 4.4) / 4) || 1, xlabel: "adapted layer", xname: (l) => shortLayer(layers[l]) })
      : bars(shown.map(([name, entry]) => ({ name, value: entry[key][0], color: "var(--heat)" })), (v) => v.toFixed(2), 1);
    return panel(title, text, [body, numbers(["layer", ...shown.map((s) => s[0])], layers.map((name, l) => [name, ...shown.map(([, entry]) => fixed(entry[key][l]))]))]);
  }

  // Losses.
  function losses() {
    const effects = everything.effects;
    const cards = shown.map(([name, entry]) => {
      const x = entry.effects;
      const rows = [{ name: "X-LoRA", value: entry.loss, me: true, color: "var(--ink)" }, { name: "base", value: entry.base_loss }];
      if (x) {
        rows.push({ name: "uniform mix", value: x.uniform }, { gap: "one expert alone" });
        experts.forEach((expert, e) => rows.push({ name: expert, e, value: x.alone[e], color: color(e) }));
      }
      const most = Math.max(...rows.filter((r) => !r.gap).map((r) => r.value));
      const more = x ? [{ gap: "without one expert: change of the loss" }, ...experts.map((expert, e) => {
        const change = x.without[e] - entry.loss;
        return { name: expert, e, value: Math.max(change, 0), color: color(e), label: (change < 0 ? "−" : "+") + Math.abs(change).toFixed(3), kind: change < -0.0005 ? "good" : "" };
      })] : [];
      const scale = x ? Math.max(...x.without.map((v) => v - entry.loss), 1e-9) : 1;
      return el("div", {}, el("h3", {}, name), bars(rows, (v) => fixed(v), most), x ? bars(more, (v) => fixed(v), scale) : null);
    });
    const header = ["text", "base", "X-LoRA", ...(effects ? ["uniform", ...experts.map((x) => x + " alone"), ...experts.map((x) => "without " + x)] : [])];
    const rows = shown.map(([name, entry]) => [name, fixed(entry.base_loss), fixed(entry.loss), ...(effects ? [entry.effects.uniform, ...entry.effects.alone, ...entry.effects.without].map((v) => fixed(v)) : [])]);
    return panel("Loss with and without experts", effects ? "In nats per token; lower is better. Without an expert: its gate is set to zero, the others stay." : "In nats per token; lower is better. --effects adds each expert alone, left out, and the uniform mix.", [el("div", { class: "cards" }, cards), numbers(header, rows)]);
  }

  // Experts with experts, layers with layers.
  function pairs() {
    const co = experts.map((_, i) => experts.map((_, j) => mean(everything.co_use.map((m) => m[i][j]))));
    const one = panel("Experts used together", "Cosine of two experts' shares over all tokens and layers: 1 if they always rise and fall together, 0 if never both.",
      el("div", { class: "maps" }, el("figure", {}, heat(co, experts, experts, (i, j) => line(`${experts[i]} and ${experts[j]}`, `co-use ${fixed(co[i][j])}`), { cell: Math.max(16, Math.min(40, 300 / N)), rowHeight: Math.max(14, Math.min(34, 260 / N)), label: (name) => name, colored: true }))), ramp());
    if (L < 2) return [one];
    const side = Math.max(2.2, Math.min(26, 330 / L, (innerWidth - 150) / L));
    const two = panel("Agreement between layers", "Share of tokens that have the same leading expert at two layers.",
      el("div", { class: "maps" }, el("figure", {}, layerMap(side))), ramp());
    return [one, two];
  }
  function layerMap(side) {
    const every = Math.max(1, Math.ceil(11 / side)), left = widest(layers);
    return sv("svg", { width: left + L * side + 4, height: L * side + 6, viewBox: `0 0 ${left + L * side + 4} ${L * side + 6}`, role: "img", "aria-label": "Agreement between layers" }, layers.map((name, a) => [
      a % every === 0 ? sv("text", { x: left - 7, y: (a + 0.5) * side + 4, "text-anchor": "end" }, shorten(shortLayer(name), 12)) : null,
      layers.map((_, b) => sv("rect", { class: "cell", x: left + b * side, y: a * side, width: Math.max(side - 0.8, side * 0.8), height: Math.max(side - 0.8, side * 0.8), rx: side > 9 ? 2 : 0, style: { "--v": (everything.agreement[a][b] * 100).toFixed(1) + "%" },
        tip: () => line(`${percent(everything.agreement[a][b])} of the tokens agree`, layers[a], layers[b]) })),
    ]));
  }

  // Curves of the training run.
  function training() {
    const train = report.training.filter((entry) => entry.kind === "train" && entry.loss !== null), evals = report.training.filter((entry) => entry.kind === "eval");
    if (train.length < 2) return [];
    const steps = train.map((entry) => entry.step), found = [];
    const held = [...new Set(evals.flatMap((entry) => Object.keys(entry).filter((k) => k.endsWith("_loss"))))];
    const series = [{ name: "training", values: train.map((entry) => entry.loss), all: true, color: "var(--ink)" },
      ...held.map((key, i) => {
        const own = evals.filter((entry) => typeof entry[key] === "number");
        return { name: key.slice(0, -5), xs: own.map((entry) => entry.step), values: own.map((entry) => entry[key]), ...styleOf(key.slice(0, -5), i + 1) };
      }).filter((s) => s.values.length)];
    const values = series.flatMap((s) => s.values), low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.05 || 0.1;
    found.push(panel("Training: loss", "In nats per token, by step; held-out data if there is any.", lines(series, steps, { min: low - pad, max: high + pad, xlabel: "step", xname: (i) => whole(steps[i]) })));
    const gates = experts.map((name) => train.map((entry) => entry["gate/" + name]));
    if (gates.every((g) => g.every((v) => typeof v === "number"))) found.push(panel("Training: use of the experts", "Mean gate of each expert, by step.", areas(gates, steps)));
    return found;
  }
  function areas(gates, steps) {
    const W = narrow ? 350 : 520, H = 220, left = 42, right = 92, top = 10, bottom = 30, low = steps[0], span = steps[steps.length - 1] - low || 1;
    const totals = steps.map((_, i) => sum(gates.map((g) => Math.max(g[i], 0))) || 1);
    const X = (i) => left + (W - left - right) * (steps[i] - low) / span, Y = (v) => top + (H - top - bottom) * (1 - v);
    let base = steps.map(() => 0), endsAt = -99;
    return sv("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", role: "img", "aria-label": "Mean gate of each expert by step" },
      [0, 0.5, 1].map((v) => sv("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end" }, percent(v))),
      experts.map((name, e) => {
        const upper = base.map((b, i) => b + Math.max(gates[e][i], 0) / totals[i]);
        const d = [...upper.map((v, i) => [X(i), Y(v)]), ...base.map((v, i) => [X(i), Y(v)]).reverse()].map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("") + "Z";
        const middle = Y((upper[upper.length - 1] + base[base.length - 1]) / 2);
        base = upper;
        const last = steps.length - 1;
        return [sv("path", { class: "area", d, style: { "--c": color(e) }, tip: () => line(chip(e), `mean gate ${percent(gates[e][0])} at step ${steps[0]}, ${percent(gates[e][last])} at step ${steps[last]}`) }),
          sv("text", { x: W - right + 8, y: middle + 4 }, shorten(name, 12))];
      }),
      sv("text", { x: left, y: H - 8 }, whole(steps[0])), sv("text", { x: W - right, y: H - 8, "text-anchor": "end" }, whole(steps[steps.length - 1])),
      sv("text", { x: (left + W - right) / 2, y: H - 8, "text-anchor": "middle", class: "strong" }, "step"));
  }

  function foot() {
    const m = report.model;
    return el("footer", { class: "foot" }, el("dl", {},
      el("dt", {}, "Mean gate"), el("dd", {}, "the weight an expert gets, over the predicted tokens"),
      el("dt", {}, "Entropy"), el("dd", {}, "0 if one expert has all the weight of a token, 1 if all have the same (normalized by log N)"),
      el("dt", {}, "Experts per token, in use"), el("dd", {}, "exp(entropy) of a token's weights, and of the mean weights"),
      el("dt", {}, "Settings"), el("dd", {}, `${m.name ? m.name + ": " : ""}${N} experts, ${m.layerwise ? "one gate per layer" : "one gate for all layers"}, ${m.top_k ? "top-" + m.top_k : "all experts mixed"}, classifier of depth ${m.depth}, xlora-jax ${report.version}`)));
  }

  const toggle = themeButton();
  if (root.dataset.view === "tokens") {
    page.append(el("section", {}, el("div", { class: "head" }, legend()), tokenView(data.samples)));
  } else {
    page.append(...[
      el("div", { class: "top" }, el("span", {}, el("span", { class: "mark" }, "xlora-jax"), " routing report"), toggle),
      el("header", {}, el("h1", {}, report.title), findings()), tiles(),
      el("div", { class: "bar" }, legend()),
      data.samples.length ? panel("Token by token", "", tokenView(data.samples)) : null,
      usage(), L > 1 ? gateMaps() : el("div", { class: "pair" }, gateMaps(), pairs()),
      el("div", { class: "pair" }, byLayer("entropy", L > 1 ? "Entropy by layer" : "Entropy", "0: one expert has all the weight of a token. 1: all experts have the same."), byLayer("change", "Change from token to token", "Distance between the weights of neighboring tokens: 0 if nothing changes, 1 if everything does.")),
      losses(), L > 1 ? el("div", { class: "pair" }, pairs()) : null,
      report.training ? el("div", { class: "pair" }, training()) : null,
      foot(),
    ].filter(Boolean));
  }
  root.dataset.ready = "true";
})();
