"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const controls = { sort: find("sort"), target: find("target"), layer: find("layer"), subset: find("subset"), least: find("least") };
  document.body.classList.add("scripted");

  const address = (target, layer, feature) =>
    (target === "change" ? "" : target + "-") + "L" + String(layer).replace(".", "-") + "F" + String(feature).padStart(3, "0");
  const largest = (values, subset) => {
    const chosen = subset < 0 ? values : [values[subset]];
    return Math.max(...chosen.map((one) => Math.abs(one ?? 0)));
  };
  const wanted = () => ({
    sort: controls.sort.value,
    target: controls.target.value,
    layer: controls.layer.value === "" ? null : Number(controls.layer.value),
    subset: data.subsets.indexOf(controls.subset.value),
    least: Number(controls.least.value) || 0,
  });

  // Cards: the page has them in order of rank; they are moved and hidden, never made.
  const deck = find("deck");
  const cards = [...deck.children].map((element) => ({ element, ...data.cards[element.id] }));
  const keys = {
    rank: (card) => card.rank + (card.target === "change" ? 0 : 1e9),
    layer: (card) => parseInt(card.layer),
    ablated: (card, subset) => -largest(card.ablated, subset),
    alone: (card, subset) => -largest(card.alone, subset),
    fires: (card, subset) => -largest(card.fires, subset),
  };
  const showCards = () => {
    const { sort, target, layer, subset, least } = wanted();
    const key = keys[sort];
    const ordered = cards
      .map((card) => [key(card, subset), card.target, card.rank, card])
      .sort((a, b) => a[0] - b[0] || a[1].localeCompare(b[1]) || a[2] - b[2]);
    let shown = 0;
    for (const [, , , card] of ordered) {
      const fires = subset < 0 || (card.fires[subset] ?? 0) > 0;
      const strong = Math.max(largest(card.ablated, subset), largest(card.alone, subset)) >= least;
      const visible = fires && strong && (!target || card.target === target) && (layer === null || parseInt(card.layer) === layer);
      card.element.hidden = !visible;
      shown += visible;
      deck.append(card.element);
    }
    find("shown").textContent = shown + " of " + cards.length + " cards.";
  };

  // The list: only the rows in sight exist.
  const HEIGHT = 30, SPARE = 8;
  const view = find("view"), rows = find("rows"), heads = [...document.querySelectorAll("#heads button")];
  let order = { column: 3, down: false }, listed = [];
  const cell = (text) => {
    const element = document.createElement("span");
    element.textContent = text;
    return element;
  };
  const draw = () => {
    const first = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - SPARE);
    const last = Math.min(listed.length, first + Math.ceil(view.clientHeight / HEIGHT) + 2 * SPARE);
    const made = [];
    for (let place = first; place < last; place++) {
      const row = listed[place], [target, layer, feature, rank, effect] = row;
      const line = document.createElement("div");
      line.className = "row";
      line.style.top = place * HEIGHT + "px";
      line.setAttribute("role", "row");
      line.setAttribute("aria-rowindex", place + 2);
      const id = address(target, layer, feature);
      const label = row[row.length - 1] ? "BOS" : feature;
      const named = cell(data.cards[id] ? "" : label);
      if (data.cards[id]) {
        const link = document.createElement("a");
        link.href = "#" + id;
        link.textContent = label;
        named.append(link);
      }
      const fires = row.slice(5, 5 + data.subsets.length).map((one) => cell(one === null ? "-" : (100 * one).toFixed(1) + "%"));
      line.append(cell(target), cell(layer), named, cell(rank), cell(effect.toFixed(5)), ...fires);
      for (const one of line.children) one.setAttribute("role", "cell");
      made.push(line);
    }
    rows.replaceChildren(...made);
  };
  const showList = () => {
    const { target, layer, subset } = wanted();
    listed = data.list.filter(
      (row) => (!target || row[0] === target) && (layer === null || parseInt(row[1]) === layer) && (subset < 0 || row[5 + subset] > 0),
    );
    const { column, down } = order, sign = down ? -1 : 1;
    listed.sort((a, b) => {
      const one = a[column], other = b[column];
      return sign * (typeof one === "string" ? one.localeCompare(other) : (one ?? -1) - (other ?? -1)) || a[3] - b[3];
    });
    rows.style.height = listed.length * HEIGHT + "px";
    heads.forEach((head, place) => {
      head.parentElement.setAttribute("aria-sort", place === column ? (down ? "descending" : "ascending") : "none");
    });
    find("listed").textContent = listed.length.toLocaleString("en") + " of " + data.list.length.toLocaleString("en") + " features.";
    draw();
  };
  heads.forEach((head, place) =>
    head.addEventListener("click", () => {
      order = { column: place, down: order.column === place ? !order.down : place > 3 };
      view.scrollTop = 0;
      showList();
    }),
  );
  view.addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);

  const show = () => {
    showCards();
    view.scrollTop = 0;
    showList();
  };
  for (const one of Object.values(controls)) one.addEventListener("input", show);
  const follow = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (card && card.parentElement === deck) {
      card.hidden = false;
      card.scrollIntoView();
    }
  };
  addEventListener("hashchange", follow);
  show();
  follow();
})();
