"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const { nodes, tokens, output } = data;
  const box = find("box"), heads = find("heads"), lanes = find("lanes"), drawing = find("drawing"), panel = find("panel");
  const controls = { share: find("share"), grouping: find("grouping"), labels: find("labels"), every: find("every") };
  const grouping = () => controls.grouping !== null && controls.grouping.checked; // the switch is there if there are groups
  const MOST = 120; // nodes drawn to begin with
  const LABELLED = 90; // nodes up to which they have labels to begin with
  const MANY = 1500; // edges from which those off the selected paths are hidden, as painting them takes long
  const LISTED = 12; // edges of a list in the panel
  const HEAD = 46, RUN = 3; // pixels of the column heads; tokens without nodes from which they share a column
  const ORDER = ["qkv", "o", "mlp"];
  document.body.classList.add("scripted");
  for (const node of nodes) if (node.kind === "rest") node.position = output.position; // it has none: below what it acts on

  const SVG = "http://www.w3.org/2000/svg";
  const filled = (element, attributes, children) => {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
  const html = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
  const button = (attributes, action, ...children) => {
    const made = html("button", { type: "button", ...attributes }, ...children);
    made.addEventListener("click", action);
    return made;
  };
  const brush = document.createElement("canvas").getContext("2d");
  const widthOf = (text, font) => {
    brush.font = font;
    return brush.measureText(text).width;
  };
  const LABEL = "11px system-ui, sans-serif", TOKEN = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';
  const cut = (text, most) => {
    const characters = [...text];
    return characters.length > most ? characters.slice(0, most - 1).join("") + "\u2026" : text;
  };
  const signed = (value) => (value > 0 ? "+" : "") + (Math.abs(value) >= 0.001 || value === 0 ? Number(value.toPrecision(3)) : value.toExponential(1));
  const percent = (share) => (100 * share).toFixed(share >= 0.1 ? 0 : 1) + "%";
  const counted = (count, what) => count.toLocaleString("en") + " " + what + (count === 1 ? "" : "s");

  // What is known of the whole graph.
  const groups = new Map(data.groups.map((one) => [one.number, one]));
  const arriving = nodes.map(() => 0);
  const largest = { output: 0, others: 0 };
  for (const [, target, weight] of data.edges) {
    arriving[target] += Math.abs(weight);
    const where = nodes[target].kind === "output" ? "output" : "others";
    largest[where] = Math.max(largest[where], Math.abs(weight));
  }
  const ranked = nodes.map((_, number) => number).filter((number) => nodes[number].kind !== "output");
  const outputs = [...nodes.keys()].filter((number) => nodes[number].kind === "output");
  ranked.sort((a, b) => nodes[b].influence - nodes[a].influence || a - b);
  const cumulated = [];
  for (const number of ranked) cumulated.push((cumulated.at(-1) ?? 0) + Math.max(0, nodes[number].influence));
  const whole = cumulated.at(-1) ?? 0;
  const mostInfluential = Math.max(0.001, ...ranked.map((number) => nodes[number].influence));
  const keep = (share) => {
    if (share >= 1 || whole <= 0) return ranked;
    const enough = cumulated.findIndex((sum) => sum >= share * whole * (1 - 1e-9));
    return ranked.slice(0, enough + 1);
  };
  if (ranked.length > MOST && controls.grouping !== null) {
    controls.grouping.checked = true; // groups are fewer than their features, so most of them fit
    const units = (count) => new Set(ranked.slice(0, count).map((number) => (nodes[number].group === null ? number : nodes[number].group + "@" + nodes[number].position))).size;
    let count = ranked.length;
    while (count > MOST && units(count) > MOST) count = Math.floor(0.9 * count);
    controls.share.value = whole > 0 ? Math.max(1, Math.floor((100 * cumulated[count - 1]) / whole)) : 100;
  } else if (ranked.length > MOST && whole > 0) {
    controls.share.value = Math.max(1, Math.floor((100 * cumulated[MOST - 1]) / whole));
  }

  // Units are what is drawn: a node, or the nodes of one group at one position.
  const opened = new Set();
  let units = [], lines = [], byId = new Map(), unitOf = new Map(), selection = null, current = null;
  const choose = () => {
    const kept = [...keep(controls.share.value / 100), ...outputs];
    const made = new Map();
    unitOf = new Map();
    for (const number of kept) {
      const node = nodes[number];
      const key = node.kind === "feature" && node.group !== null && grouping() ? "g" + node.group + "@" + node.position : "";
      const id = key && !opened.has(key) ? key : "n" + number;
      if (!made.has(id)) made.set(id, { id, node, number, members: [], group: id === key ? node.group : null, influence: 0 });
      const unit = made.get(id);
      unit.members.push(number);
      unit.influence += node.influence;
      unitOf.set(number, unit);
    }
    units = [...made.values()];
    byId = made;
    const sums = new Map();
    for (const [source, target, weight] of data.edges) {
      const from = unitOf.get(source), to = unitOf.get(target);
      if (!from || !to || from === to) continue;
      const key = from.id + " " + to.id, line = sums.get(key);
      if (line) line.weight += weight;
      else sums.set(key, { from, to, weight });
    }
    lines = [...sums.values()];
    for (const unit of units) [unit.into, unit.out] = [[], []];
    for (const line of lines) {
      line.from.out.push(line);
      line.to.into.push(line);
    }
    const features = ranked.filter((number) => unitOf.has(number)).length;
    const drawn = units.length === kept.length ? "" : ", as " + counted(units.length, "node");
    find("percent").textContent = controls.share.value + "%";
    find("drawn").textContent =
      "Drawn: " + features.toLocaleString("en") + " of " + counted(ranked.length, "node") + " besides the output" + drawn + ", and " +
      lines.length.toLocaleString("en") + (drawn ? " lines for their edges" : " of " + counted(data.edges.length, "edge")) + ".";
  };

  // Words of a unit.
  const at = (unit) => (unit.node.kind === "output" || unit.node.kind === "rest" ? "" : tokens[unit.node.position]);
  const brief = (unit) => {
    const { kind, site, layer, feature } = unit.node;
    if (unit.group !== null) return "group " + unit.group + " (" + unit.members.length + ")";
    if (kind === "output") return "output";
    if (kind === "rest") return "un-finetuned rest";
    return layer + " " + site + (feature === null || kind === "bos" ? "" : " #" + feature);
  };
  const label = (unit) => {
    const { kind, feature, promoted } = unit.node;
    if (unit.group !== null) return "group " + unit.group;
    if (kind === "output") return cut(output.words, 60);
    if (kind === "rest") return "rest";
    if (kind === "bos") return "";
    return promoted.length ? cut(promoted[0], 12) : feature === null ? "" : "#" + feature;
  };
  const spoken = (unit) => {
    const { kind, name, position, promoted } = unit.node;
    if (kind === "output") return "Output: " + output.words;
    const where = ", at position " + position + ", token " + tokens[position];
    const influence = "; influence " + percent(unit.influence);
    if (unit.group !== null) return "Group " + unit.group + " of features, " + unit.members.length + " here" + where + influence + "; Enter opens it";
    return name + (kind === "rest" ? "" : where) + influence + (promoted.length ? "; promotes " + promoted.slice(0, 3).join(" ") : "");
  };
  const classes = (unit) => {
    const { kind, site } = unit.node;
    return unit.group !== null ? "group" : kind === "feature" ? site : kind === "bos" ? "bos " + site : kind;
  };
  const shapeOf = (unit) => (unit.group !== null ? "group" : unit.node.site || unit.node.kind);

  // Where each unit is: a lane for each kind of site of a layer, a column for each position.
  const laneOf = ({ node }) => (node.kind === "output" ? 1e9 : node.kind === "rest" ? -2 : node.kind === "bos" ? -1 : node.layer * 3 + ORDER.indexOf(node.site));
  const laneName = (lane) => (lane === 1e9 ? ["", "output"] : lane === -2 ? ["", "rest"] : lane === -1 ? ["", "BOS"] : [Math.floor(lane / 3), ORDER[lane % 3]]);
  const layerOf = (lane) => (lane < 0 || lane === 1e9 ? lane : Math.floor(lane / 3));
  const SIDE = 62;
  let columns = [], rows = [], size = { width: 0, height: 0 }, touch = false;
  const arrange = () => {
    touch = matchMedia("(max-width: 40rem), (pointer: coarse)").matches;
    const labelled = controls.labels.checked, pitch = touch ? 44 : 29, height = touch ? 44 : 27;
    const cells = new Map();
    for (const unit of [...units].sort((a, b) => b.influence - a.influence)) {
      unit.radius = unit.node.kind === "output" || unit.group !== null ? 10 : 5.5 + 4.5 * Math.sqrt(Math.min(1, unit.influence / mostInfluential));
      unit.label = labelled || unit.node.kind === "output" ? label(unit) : "";
      const own = labelled && unit.node.kind !== "output" ? pitch - 3 + Math.ceil(widthOf(unit.label, LABEL)) : pitch;
      unit.room = Math.max(pitch, own);
      const key = laneOf(unit) + " " + unit.node.position;
      if (!cells.has(key)) cells.set(key, { lane: laneOf(unit), position: unit.node.position, units: [] });
      cells.get(key).units.push(unit);
    }
    const wide = new Map(), tall = new Map();
    for (const cell of cells.values()) {
      const across = Math.max(labelled ? 2 : 4, Math.ceil(Math.sqrt((labelled ? 1 : 2) * cell.units.length)));
      cell.lines = [];
      for (let place = 0; place < cell.units.length; place += across) cell.lines.push(cell.units.slice(place, place + across));
      cell.width = Math.max(...cell.lines.map((line) => line.reduce((sum, unit) => sum + unit.room, 0)));
      wide.set(cell.position, Math.max(wide.get(cell.position) ?? 0, cell.width));
      tall.set(cell.lane, Math.max(tall.get(cell.lane) ?? 0, cell.lines.length));
    }
    columns = [];
    const fixed = (position) => wide.has(position) || position === 0 || position === output.position || controls.every.checked;
    for (let from = 0; from < tokens.length; ) {
      let to = from;
      while (!fixed(to) && to < tokens.length && !(to > from && fixed(to))) to++;
      if (to - from < RUN) to = from + 1;
      const text = to - from > 1 ? to - from + " tokens" : cut(tokens[from], 16);
      columns.push({ from, to, text, width: Math.max((wide.get(from) ?? 0) + 8, Math.ceil(widthOf(text, TOKEN)) + 14, 26) });
      from = to;
    }
    const spare = box.clientWidth - SIDE - 1 - columns.reduce((sum, column) => sum + column.width, 0);
    let x = 0;
    for (const column of columns) {
      if (spare > 0) column.width += spare / columns.length;
      column.x = x;
      x += column.width;
    }
    const columnOf = (position) => columns.find((column) => column.from <= position && position < column.to);
    rows = [...tall.keys()].sort((a, b) => b - a).map((lane) => ({ lane, layer: layerOf(lane) }));
    let y = 8;
    rows.forEach((row, place) => {
      const above = rows[place - 1];
      if (above && above.layer !== row.layer) {
        row.gap = above.layer < 1e9 && row.layer >= 0 && above.layer - row.layer > 1;
        y += row.gap ? 14 : 5;
      }
      row.y = y;
      row.height = tall.get(row.lane) * height;
      y += row.height;
    });
    const rowOf = new Map(rows.map((row) => [row.lane, row]));
    for (const cell of cells.values()) {
      const column = columnOf(cell.position), row = rowOf.get(cell.lane);
      cell.lines.forEach((line, number) => {
        const width = line.reduce((sum, unit) => sum + unit.room, 0);
        let left = column.x + (labelled ? 4 : Math.max(4, (column.width - width) / 2));
        for (const unit of line) {
          unit.x = left + pitch / 2;
          unit.y = row.y + (number + 0.5) * height;
          left += unit.room;
        }
      });
    }
    size = { width: x, height: y + 8 };
  };

  const curve = ({ from, to }) => {
    const rise = from.y - to.y, bend = Math.max(12, Math.abs(rise) * 0.45) * (rise < 0 ? -1 : 1);
    // Above each other, a straight line would run through the nodes between.
    const aside = Math.abs(from.x - to.x) < 4 && Math.abs(rise) > 40 ? Math.min(44, 8 + Math.abs(rise) / 12) : 0;
    const [a, b, c, d] = [from.x, from.y, to.x, to.y].map((one) => one.toFixed(1));
    return "M" + a + " " + b + "C" + (from.x - aside).toFixed(1) + " " + (from.y - bend).toFixed(1) + " " + (to.x - aside).toFixed(1) + " " + (to.y + bend).toFixed(1) + " " + c + " " + d;
  };
  const strength = (line) => Math.min(1, Math.abs(line.weight) / (largest[line.to.node.kind === "output" ? "output" : "others"] || 1));
  const draw = () => {
    const focused = drawing.contains(document.activeElement);
    choose();
    arrange();
    if (selection && !selection.ids.every((id) => byId.has(id))) selection = null;
    find("canvas").style.setProperty("--side", SIDE + "px");
    heads.style.width = size.width + "px";
    heads.replaceChildren(
      ...columns.map((column) => {
        const run = column.to - column.from > 1;
        const head = html("div", run ? { class: "run", title: tokens.slice(column.from, column.to).join("") } : { title: tokens[column.from] });
        head.classList.toggle("asked", column.from <= output.position && output.position < column.to);
        head.style.left = column.x + "px";
        head.style.width = column.width + "px";
        head.append(html("bdi", {}, column.text), html("small", {}, run ? column.from + "\u2013" + (column.to - 1) : String(column.from)));
        return head;
      }),
    );
    lanes.style.height = size.height + "px";
    lanes.replaceChildren(
      ...rows.map((row, place) => {
        const [layer, kind] = laneName(row.lane);
        const lane = html("div", {}, html("b", {}, layer === "" || rows[place - 1]?.layer === row.layer ? "" : String(layer)), kind);
        lane.style.top = row.y + "px";
        lane.style.height = row.height + "px";
        return lane;
      }),
    );
    const behind = svg("g");
    let dark = false;
    rows.forEach((row, place) => {
      if (row.layer !== rows[place - 1]?.layer) dark = !dark;
      if (dark) behind.append(svg("rect", { class: "band", x: 0, y: row.y, width: size.width, height: row.height }));
      if (row.gap) behind.append(svg("line", { class: "gap", x1: 0, x2: size.width, y1: row.y - 7, y2: row.y - 7 }));
    });
    for (const column of columns.slice(1)) behind.append(svg("line", { class: "column", x1: column.x, x2: column.x, y1: 0, y2: size.height }));
    const wires = svg("g"), marks = svg("g");
    lines.sort((a, b) => strength(a) - strength(b));
    for (const line of lines) {
      const strong = strength(line);
      line.element = svg("path", {
        class: "edge " + (line.weight < 0 ? "less" : "more") + (line.from.node.kind === "rest" && line.to.node.kind !== "output" ? " base" : ""),
        d: curve(line),
        "stroke-width": (0.7 + 4.8 * Math.sqrt(strong)).toFixed(2),
        style: "--strength: " + (0.12 + 0.68 * Math.sqrt(strong)).toFixed(2),
      });
      wires.append(line.element);
    }
    // In the order in which a reader goes through them.
    units.sort((a, b) => b.y - a.y || a.x - b.x);
    for (const unit of units) marks.append(mark(unit));
    drawing.setAttribute("width", size.width);
    drawing.setAttribute("height", size.height);
    drawing.classList.toggle("many", lines.length >= MANY);
    drawing.replaceChildren(behind, wires, marks);
    if (!byId.has(current)) current = selection ? selection.ids[0] : units.at(-1).id;
    byId.get(current).element.setAttribute("tabindex", 0);
    show();
    if (focused) byId.get(current).element.focus({ preventScroll: true });
  };
  const mark = (unit) => {
    const reach = touch ? 21 : 13.5;
    const shape = svg("g", { transform: "scale(" + (unit.radius / 10).toFixed(2) + ")" }, svg("use", { href: "#shape-" + shapeOf(unit), class: "shape" }));
    unit.element = svg(
      "g",
      {
        class: "node " + classes(unit),
        transform: "translate(" + unit.x.toFixed(1) + " " + unit.y.toFixed(1) + ")",
        role: "button",
        tabindex: -1,
        "aria-label": spoken(unit),
        "aria-pressed": "false",
        "data-id": unit.id,
      },
      svg("title", {}, spoken(unit)),
      svg("rect", { class: "hit", x: -reach, y: -reach, width: 2 * reach, height: 2 * reach }),
      svg("circle", { class: "ring", r: (unit.radius + 4.5).toFixed(1) }),
      shape,
    );
    if (unit.group !== null) unit.element.append(svg("text", { class: "count", y: 4 }, String(unit.members.length)));
    if (unit.label) {
      const before = unit.node.kind === "output" && unit.x > size.width / 2;
      const text = svg("text", { x: (before ? -1 : 1) * (unit.radius + 5), y: 4, "text-anchor": before ? "end" : "start" }, unit.label);
      if (unit.label.startsWith("#") && !unit.node.promoted.length) text.classList.add("quiet");
      unit.element.append(text);
    }
    return unit.element;
  };

  // The selected units, what leads to them and what they lead to.
  const reached = (ids, side, end) => {
    const found = new Set(), seen = new Set(ids), open = [...ids];
    while (open.length) {
      for (const line of byId.get(open.pop())[side]) {
        found.add(line);
        if (seen.has(line[end].id)) continue;
        seen.add(line[end].id);
        open.push(line[end].id);
      }
    }
    return found;
  };
  const show = () => {
    const chosen = new Set(selection ? selection.ids : []);
    const path = new Set([...reached(chosen, "into", "from"), ...reached(chosen, "out", "to")]);
    const on = new Set(chosen);
    for (const line of path) on.add(line.from.id).add(line.to.id);
    drawing.classList.toggle("picked", selection !== null);
    for (const line of lines) {
      line.element.classList.toggle("path", path.has(line));
      line.element.classList.toggle("direct", chosen.has(line.from.id) || chosen.has(line.to.id));
    }
    const places = new Set();
    for (const unit of units) {
      unit.element.classList.toggle("path", on.has(unit.id));
      unit.element.classList.toggle("chosen", chosen.has(unit.id));
      unit.element.setAttribute("aria-pressed", String(chosen.has(unit.id)));
      if (chosen.has(unit.id)) places.add(unit.node.position);
    }
    columns.forEach((column, number) => heads.children[number].classList.toggle("chosen", column.to - column.from === 1 && places.has(column.from)));
    describe();
  };

  // The panel.
  const icon = (unit) => svg("svg", { width: 15, height: 15, viewBox: "-12 -12 24 24", class: classes(unit), "aria-hidden": "true" }, svg("use", { href: "#shape-" + shapeOf(unit), class: "shape" }));
  const token = (text, tag = "span") => html(tag, { class: "token" }, html("bdi", {}, text));
  const entry = (unit, amount, kind, words, share) =>
    html("li", {}, button({ "aria-label": words }, () => pick(unit, true), html("span", { class: "size " + kind }, amount), icon(unit), html("span", { class: "who" }, brief(unit) + " ", ...(at(unit) ? [token(at(unit))] : [])), html("span", { class: "help" }, share)));
  const arrivingAt = (unit) => unit.members.reduce((sum, number) => sum + arriving[number], 0);
  // For each unit at that end its lines as one: several features of a group may be selected.
  const merged = (among, end) => {
    const found = new Map();
    for (const line of among) {
      const known = found.get(line[end].id);
      if (!known) found.set(line[end].id, { ...line, targets: [line.to] });
      else {
        known.weight += line.weight;
        if (!known.targets.includes(line.to)) known.targets.push(line.to);
      }
    }
    return [...found.values()];
  };
  const list = (title, among, end) => {
    const sorted = merged(among, end).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    const made = [html("h4", {}, title + (sorted.length > LISTED ? ": strongest " + LISTED + " of " + sorted.length : ": " + (sorted.length || "none is drawn")))];
    if (sorted.length) {
      made.push(
        html(
          "ul",
          {},
          ...sorted.slice(0, LISTED).map((line) => {
            const total = line.targets.reduce((sum, unit) => sum + arrivingAt(unit), 0);
            const share = total ? percent(Math.min(1, Math.abs(line.weight) / total)) : "";
            const words = (end === "from" ? "From " : "To ") + spoken(line[end]) + "; effect " + signed(line.weight) + ", " + share + " of what arrives there";
            return entry(line[end], signed(line.weight), line.weight < 0 ? "less" : "more", words, share);
          }),
        ),
      );
    }
    return made;
  };
  const facts = (pairs) =>
    html("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== "").flatMap(([key, value]) => [html("dt", {}, key), html("dd", {}, ...[value].flat())]));
  const chips = (texts) => texts.flatMap((text, place) => (place ? [" ", token(text, "code")] : [token(text, "code")]));
  const heading = (...children) => html("h3", { tabindex: -1 }, ...children);
  const describe = () => {
    const close = button({}, clear, "Clear");
    if (!selection) {
      const first = [...units].filter((unit) => unit.node.kind !== "output").sort((a, b) => b.influence - a.influence).slice(0, LISTED);
      panel.replaceChildren(heading("Select a node"), html("p", { class: "help" }, "Its place, what it does and its edges are shown here."));
      if (first.length) {
        panel.append(html("h4", {}, "Most influential"), html("ul", {}, ...first.map((unit) => entry(unit, percent(unit.influence), "", "Select " + spoken(unit), ""))));
      }
      return;
    }
    const chosen = selection.ids.map((id) => byId.get(id)), ids = new Set(selection.ids);
    const into = chosen.flatMap((unit) => unit.into).filter((line) => !ids.has(line.from.id));
    const out = chosen.flatMap((unit) => unit.out).filter((line) => !ids.has(line.to.id));
    const unit = chosen[0], { kind, position, promoted, group, card } = unit.node;
    const where = [token(tokens[position], "code"), " position " + position];
    const known = groups.get(group);
    const fold = (words) => button({}, () => shut(group, position), words);
    if (selection.group !== undefined) {
      panel.replaceChildren(
        heading("Group " + group),
        facts([
          ["At", where],
          ["Fires on", known?.fires_on.length ? chips(known.fires_on) : ""],
          ["Features", chosen.length + " here" + (known ? ", " + known.size + " in the group" : "")],
          ["Influence", percent(chosen.reduce((sum, one) => sum + one.influence, 0)) + " together"],
        ]),
        fold("Close the group"),
        " ",
        close,
        html("h4", {}, "Its features here"),
        html("ul", {}, ...chosen.map((one) => entry(one, percent(one.influence), "", "Select " + spoken(one), ""))),
      );
    } else if (kind === "output") {
      panel.replaceChildren(heading(icon(unit), "Output"), facts([["What", output.words], ["Value", signed(output.value)], ["After", where]]), close);
    } else {
      const known = groups.get(group);
      const grouped = group === null ? "" : [String(group), ...(known?.fires_on.length ? [", fires on ", ...chips(known.fires_on)] : [])];
      panel.replaceChildren(
        heading(icon(unit), unit.node.name),
        facts([
          ["At", kind === "rest" ? "" : where],
          ["Activation", kind === "rest" ? "" : String(Number((unit.node.activation ?? 0).toPrecision(3)))],
          ["What", kind === "rest" ? "What comes from the un-finetuned model." : ""],
          ["Influence", percent(unit.influence)],
          ["Promotes", promoted.length && kind !== "bos" ? chips(promoted) : ""],
          ["Group", grouped],
          ["Card", card ? html("a", { href: card }, "open its card") : ""],
        ]),
        ...(opened.has("g" + group + "@" + position) && grouping() ? [fold("Close its group"), " "] : []),
        close,
      );
    }
    panel.append(...(kind === "rest" || kind === "bos" ? [] : list("Incoming", into, "from")), ...(kind === "output" ? [] : list("Outgoing", out, "to")));
    if (into.length + out.length) panel.append(html("p", { class: "help" }, "Effect, and its share of all effects on the same target."));
  };

  // What a reader does.
  const beneath = () => panel.getBoundingClientRect().top >= box.getBoundingClientRect().bottom;
  const reveal = (unit, scrollPage = true) => {
    const margin = 30, text = unit.label ? 60 : 0;
    const left = unit.x - margin, right = unit.x + SIDE + margin + text, top = unit.y - margin, bottom = unit.y + HEAD + margin;
    if (left < box.scrollLeft) box.scrollLeft = left;
    else if (right > box.scrollLeft + box.clientWidth) box.scrollLeft = right - box.clientWidth;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
    if (!scrollPage) return;
    const place = unit.element.getBoundingClientRect();
    if (place.bottom + margin > innerHeight) scrollBy(0, place.bottom + margin - innerHeight);
    else if (place.top - margin < 0) scrollBy(0, place.top - margin);
  };
  const move = (unit, scrollPage = true) => {
    byId.get(current)?.element.setAttribute("tabindex", -1);
    current = unit.id;
    unit.element.setAttribute("tabindex", 0);
    reveal(unit, scrollPage);
  };
  const focus = (unit) => {
    move(unit);
    unit.element.focus({ preventScroll: true });
  };
  const pick = (unit, fromPanel = false) => {
    if (unit.group !== null) {
      opened.add(unit.id);
      const ids = unit.members.map((number) => "n" + number);
      selection = { ids, group: unit.group };
      current = ids[0];
      draw();
    } else {
      selection = { ids: [unit.id] };
      show();
    }
    // On a phone the panel stays in sight while a reader walks from edge to edge.
    move(byId.get(selection.ids[0]), !fromPanel || !beneath());
    if (fromPanel) panel.querySelector("h3").focus({ preventScroll: true });
    else byId.get(current).element.focus({ preventScroll: true });
    panel.scrollTop = 0;
  };
  const shut = (group, position) => {
    const id = "g" + group + "@" + position;
    opened.delete(id);
    selection = null;
    draw();
    if (byId.has(id)) focus(byId.get(id));
  };
  const clear = () => {
    const inside = panel.contains(document.activeElement);
    selection = null;
    show();
    if (inside) focus(byId.get(current));
  };
  const beside = (unit, across, up) => {
    const others = units.filter((one) => (across ? (one.x - unit.x) * across > 1 : (unit.y - one.y) * up > 1));
    const same = others.filter((one) => (across ? Math.abs(one.y - unit.y) < 2 : one.node.position === unit.node.position));
    const away = (one) => (across ? Math.abs(one.x - unit.x) + 3 * Math.abs(one.y - unit.y) : 3 * Math.abs(one.y - unit.y) + Math.abs(one.x - unit.x));
    return (same.length ? same : others).sort((a, b) => away(a) - away(b))[0];
  };
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const ends = {
    Home: () => [...units].sort((a, b) => a.node.position - b.node.position || b.y - a.y || a.x - b.x)[0],
    End: () => units.find((unit) => unit.node.kind === "output") ?? units.at(-1),
  };
  drawing.addEventListener("keydown", (event) => {
    const unit = byId.get(event.target.dataset?.id);
    if (!unit || event.ctrlKey || event.metaKey || event.altKey) return;
    if (ARROWS[event.key]) {
      const next = beside(unit, ...ARROWS[event.key]);
      if (next) focus(next);
    } else if (ends[event.key]) focus(ends[event.key]());
    else if (event.key === "Enter" || event.key === " ") pick(unit);
    else return;
    event.preventDefault();
  });
  drawing.addEventListener("focusin", (event) => {
    const unit = byId.get(event.target.dataset?.id);
    if (unit && unit.id !== current) move(unit, false);
  });
  drawing.addEventListener("click", (event) => {
    const element = event.target.closest(".node");
    if (element) pick(byId.get(element.dataset.id));
    else if (selection) clear();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && selection) clear();
  });
  find("first").addEventListener("click", () => {
    box.scrollLeft = 0;
    focus(ends.Home());
  });
  find("last").addEventListener("click", () => focus(ends.End()));
  let waiting = 0;
  const later = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  };
  controls.share.addEventListener("input", later);
  controls.grouping?.addEventListener("change", () => {
    opened.clear();
    later();
  });
  for (const one of [controls.labels, controls.every]) one.addEventListener("change", later);
  let width = box.clientWidth;
  addEventListener("resize", () => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    later();
  });

  controls.labels.checked = grouping() || keep(controls.share.value / 100).length <= LABELLED;
  draw();
  reveal(byId.get(current), false);
})();
