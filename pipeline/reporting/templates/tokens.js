"use strict";
// The view of single tokens. All text goes into the page as text, never as markup.
{
  const island = document.getElementById("token-data");
  const root = document.getElementById("tokens");
  if (island && root) start(JSON.parse(island.textContent), root);

  function start(data, root) {
    const find = (selector) => root.querySelector(selector);
    const passageChoice = find("#passage-choice");
    const quantityChoice = find("#quantity-choice");
    const [scale, text, panel] = [find(".scale"), find(".passage"), find(".candidates")];
    const state = { passage: null, quantities: [], spans: [], here: 0, pinned: false };

    for (const [i, passage] of data.passages.entries()) {
      passageChoice.append(new Option(`${passage.domain}, block ${passage.block}`, i));
    }
    passageChoice.addEventListener("change", showPassage);
    quantityChoice.addEventListener("change", colour);
    text.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch" && !state.pinned) go(indexOf(event));
    });
    text.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index === null) return;
      state.pinned = !(state.pinned && index === state.here);
      go(index);
    });
    text.addEventListener("keydown", moveByKey);
    for (const part of [find(".controls"), scale, text, panel]) part.hidden = false;
    showPassage();

    function showPassage() {
      state.passage = data.passages[passageChoice.value];
      state.pinned = false;
      const kept = quantityChoice.selectedIndex;
      state.quantities = quantities(data, state.passage);
      quantityChoice.replaceChildren(...options(state.quantities));
      if (kept > 0 && kept < state.quantities.length) quantityChoice.selectedIndex = kept;
      state.spans = state.passage.text.map((piece, t) => token(data.pieces[piece], t));
      text.replaceChildren(...state.spans);
      colour();
      // The first row that has a target, so that the panel is not empty.
      const first = (state.passage.fused ?? {}).candidates?.findIndex((ids) => ids !== null) ?? 0;
      go(Math.max(first, 0) + 1);
    }

    function colour() {
      const quantity = state.quantities[quantityChoice.value];
      const [low, high] = quantity.bounds ?? bounds(quantity.values, quantity.step);
      root.style.setProperty("--hue", `var(--${quantity.colour})`);
      state.spans.forEach((span, t) => {
        const value = t ? quantity.values[t - 1] : null;
        const share = value === null ? 0 : (value - low) / (high - low);
        span.classList.toggle("none", value === null);
        span.style.setProperty("--share", Math.min(Math.max(share, 0), 1));
      });
      const [least, , most, unit] = scale.children;
      least.textContent = low > 0 ? `${low.toFixed(digits(quantity))} or less` : "0";
      most.textContent = quantity.bounds ? String(high) : `${high.toFixed(digits(quantity))} or more`;
      unit.textContent = quantity.unit;
    }

    function go(index) {
      if (index === null || !state.spans[index]) return;
      state.spans[state.here]?.classList.remove("here", "pinned");
      state.here = index;
      const span = state.spans[index];
      span.classList.add("here");
      span.classList.toggle("pinned", state.pinned);
      for (const each of state.spans) each.setAttribute("aria-selected", each === span);
      text.setAttribute("aria-activedescendant", span.id);
      showCandidates(panel, data, state.passage, index);
    }

    function moveByKey(event) {
      const last = state.spans.length - 1;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      let target = step ? state.here + step : null;
      if (event.key === "Home") target = 0;
      if (event.key === "End") target = last;
      if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        target = beside(state.spans, state.here, event.key === "ArrowDown");
      }
      if (event.key === "Escape") state.pinned = false;
      if (target === null && event.key !== "Escape") return;
      event.preventDefault();
      go(Math.min(Math.max(target ?? state.here, 0), last));
    }

    function indexOf(event) {
      const span = event.target.closest("[role=option]");
      return span ? Number(span.dataset.index) : null;
    }
  }

  /** The token nearest in the next line, or the line before. */
  function beside(spans, here, below) {
    const middle = (span) => span.getClientRects()[0] ?? span.getBoundingClientRect();
    const from = middle(spans[here]);
    let [best, nearest] = [here, Infinity];
    spans.forEach((span, i) => {
      const to = middle(span);
      const lines = (to.top - from.top) * (below ? 1 : -1);
      if (lines < from.height / 2) return;
      const distance = lines * 1000 + Math.abs(to.left - from.left);
      if (distance < nearest) [best, nearest] = [i, distance];
    });
    return best;
  }

  /** What the text can be coloured by. */
  function quantities(data, passage) {
    const models = [];
    if (passage.fused) models.push([data.lines.fused, passage.fused]);
    for (const [kind, group] of [["teachers", passage.teachers], ["students", passage.students]]) {
      for (const [name, columns] of Object.entries(group)) {
        models.push([data.lines[kind][name] ?? [name, "muted"], columns]);
      }
    }
    const found = [];
    const add = (group, unit, step, bounds, values) => {
      for (const [[label, hue], columns] of models) {
        const column = values(columns);
        if (column) found.push({ group, unit, step, bounds, label, colour: hue, values: column });
      }
    };
    add("entropy of the next token", "nats", 1, null, (c) => c.entropy);
    add("weight of a teacher", "share of the fused target", 0.1, null, (c) => c.weight);
    add("surprise at the token", "nats, −ln p(token)", 1, null, (c) => c.ce);
    add("probability of the token", "p(token)", 0.1, [0, 1], (c) =>
      c.ce.map((ce) => (ce === null ? null : Math.exp(-ce))),
    );
    return found;
  }

  function options(quantities) {
    const groups = new Map();
    quantities.forEach((quantity, i) => {
      if (!groups.has(quantity.group)) {
        const group = document.createElement("optgroup");
        group.label = quantity.group;
        groups.set(quantity.group, group);
      }
      const verb = quantity.group.split(" ")[0];
      groups.get(quantity.group).append(new Option(`${verb}: ${quantity.label}`, i));
    });
    return groups.values();
  }

  /** Multiples of `step` that nine tenths of the values lie between. */
  function bounds(values, step) {
    const known = values.filter((value) => value !== null).sort((a, b) => a - b);
    if (!known.length) return [0, step];
    const at = (share) => known[Math.floor((known.length - 1) * share)] / step;
    const low = Math.floor(at(0.05));
    return [low * step, Math.max(low + 1, Math.ceil(at(0.95))) * step];
  }

  function digits(quantity) {
    return quantity.step < 1 ? 1 : 0;
  }

  function token(piece, index) {
    const span = element("span");
    span.id = `token-${index}`;
    span.dataset.index = index;
    span.setAttribute("role", "option");
    for (const part of piece.split(/(\n)/)) {
      if (part === "\n") span.append(element("span", "↵", "mark"));
      span.append(part);
    }
    return span;
  }

  function showCandidates(panel, data, passage, index) {
    const [heading, cards] = panel.children;
    const known = index > 0 && (passage.fused ?? Object.values(passage.students)[0]);
    const gold = passage.text[index];
    heading.replaceChildren("token ", shown(data.pieces[gold]));
    if (index) heading.append(` after `, shown(data.pieces[passage.text[index - 1]]));
    if (!known || known.candidates[index - 1] === null) {
      heading.append(": no target, so nothing was asked of the models here");
      cards.replaceChildren();
      return;
    }
    const card = (line, columns) => oneCard(line, columns, index - 1, gold, data.pieces);
    const all = [];
    for (const [kind, group] of [["teachers", passage.teachers], ["students", passage.students]]) {
      for (const [name, columns] of Object.entries(group)) {
        all.push(card(data.lines[kind][name] ?? [name, "muted"], columns));
      }
      if (kind === "teachers" && passage.fused) all.push(card(data.lines.fused, passage.fused));
    }
    cards.replaceChildren(...all);
  }

  function oneCard([label, colour], columns, t, gold, pieces) {
    const card = element("div", "", "card");
    card.style.setProperty("--hue", `var(--${colour})`);
    const [ce, entropy] = [columns.ce[t], columns.entropy[t]]; // null: an imported cache does not tell
    const facts = [
      `p(token) ${ce === null ? "–" : short(Math.exp(-ce))}`,
      `entropy ${entropy === null ? "–" : entropy.toFixed(2)} nats`,
    ];
    if (columns.weight) facts[0] += ` · weight ${columns.weight[t].toFixed(2)}`;
    const list = element("ol");
    columns.candidates[t].forEach((piece, i) => {
      const p = columns.p[t][i];
      const item = element("li", "", piece === gold ? "gold" : "");
      item.style.setProperty("--share", p);
      item.append(element("bdi", visible(pieces[piece])), element("span", short(p)));
      list.append(item);
    });
    const left = 1 - columns.p[t].reduce((sum, p) => sum + p, 0);
    const rest = element("li", "", "left");
    rest.append(element("span", "all others"), element("span", short(Math.max(left, 0))));
    list.append(rest);
    card.append(element("h4", label), element("p", facts.join("\n"), "facts"), list);
    return card;
  }

  function short(p) {
    return p >= 0.0005 || p === 0 ? p.toFixed(3) : p.toExponential(0);
  }

  function shown(piece) {
    return element("span", visible(piece), "text");
  }

  function visible(piece) {
    return piece.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  }

  function element(tag, content = "", name = "") {
    const made = document.createElement(tag);
    if (content) made.textContent = content;
    if (name) made.className = name;
    return made;
  }
}
