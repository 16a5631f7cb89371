"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const { columns, labelled, does } = JSON.parse(byId("page-data").textContent);
  const explanations = [...document.querySelectorAll("script.explanation")].map((s) => JSON.parse(s.textContent));
  const positions = explanations[0].rows.map((row) => row.row);
  const keys = ["row", ...(labelled ? ["target", "decided"] : []), "output", "coverage", "top"];
  const state = { q: 0, row: positions[0], sort: "row", dir: "asc" };

  // names are only ever set as text
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const isolated = (tag, text, className) => {
    const node = make(tag, undefined, className);
    node.append(make("bdi", text));
    return node;
  };

  const number = (value) => {
    if (value === null) return "-";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e9)) return String(Number(value.toPrecision(3)));
    const short = Number(value.toPrecision(3));
    return short.toLocaleString("en-US", { maximumFractionDigits: 10, useGrouping: Math.abs(short) >= 10000 });
  };

  const shown = () => explanations[state.q];
  const current = () => shown().rows.find((row) => row.row === state.row);

  // -------------------------------------------------------------- one row

  const lists = (row) => {
    const sides = [["pro", row.heads[0], row.pro], ["con", row.heads[1], row.con]];
    byId("lists").replaceChildren(...sides.map(([side, head, places]) => {
      const table = make("table", undefined, side);
      table.append(isolated("caption", head));
      const line = table.createTHead().insertRow();
      for (const text of ["Column", "Value", does, "Relevance"]) {
        const cell = make("th", text);
        cell.scope = "col";
        line.append(cell);
      }
      const body = table.createTBody();
      for (const place of places) {
        const [column, value, point, relevance] = row.items[place];
        const name = isolated("th", columns[column]);
        name.scope = "row";
        body.insertRow().append(name, isolated("td", value), make("td", point || "-"), make("td", number(relevance)));
      }
      if (!places.length) {
        const cell = make("th", "no column");
        cell.colSpan = 4;
        body.insertRow().append(cell);
      }
      return table;
    }));
  };

  const bars = (row) => {
    const items = row.items.slice(0, row.bars).sort((a, b) => b[3] - a[3]);
    const low = Math.min(0, ...items.map((item) => item[3]));
    const span = Math.max(0, ...items.map((item) => item[3])) - low || 1;
    byId("bars").replaceChildren(...items.flatMap(([column, value, , relevance]) => {
      const name = isolated("span", columns[column] + (value === "-" ? "" : ` = ${value}`), "name");
      const track = make("span", undefined, "track");
      const bar = make("i", undefined, relevance >= 0 ? "for" : "against");
      const zero = make("b");
      bar.style.left = `${(100 * (Math.min(0, relevance) - low)) / span}%`;
      bar.style.width = `${(100 * Math.abs(relevance)) / span}%`;
      zero.style.left = `${(-100 * low) / span}%`;
      track.append(bar, zero);
      return [name, track, make("span", number(relevance), "value")];
    }));
    const listed = row.items.slice(row.bars);
    const others = row.rest[0] + listed.length;
    const rest = row.rest[1] + listed.reduce((sum, item) => sum + item[3], 0);
    const sums = others ? [[`${others} other column${others === 1 ? "" : "s"}`, rest]] : [];
    sums.push(...row.parts, ["Output", row.output]);
    byId("sums").replaceChildren(...sums.flatMap(([name, size]) => [isolated("dt", name), make("dd", number(size))]));
  };

  const answer = () => {
    const row = current();
    byId("why").replaceChildren(make("bdi", `Row ${row.name}: ${row.why}`));
    byId("sentence").replaceChildren(make("bdi", row.sentence));
    lists(row);
    bars(row);
    const facts = [["Output", number(row.output)], ["Coverage", number(row.coverage)], ["Unit", shown().unit]];
    if (labelled) facts.unshift(["Decided", row.decided]);
    facts.push(...row.notes.map((note) => ["Note", note]));
    byId("facts").replaceChildren(...facts.map(([name, text]) => {
      const item = make("li", `${name} `);
      const value = make("b");
      value.append(make("bdi", text));
      item.append(value);
      return item;
    }));
    byId("weak").hidden = !shown().weak;
    byId("weak").textContent = `For this question the columns carry ${number(shown().coverage)} times the output in the middle row; what no column carries makes up the rest.`;
  };

  // -------------------------------------------------------------- table of rows

  const strongest = (row) => row.items.slice(0, 3).filter((item) => item[3]);
  const sortValue = {
    row: (row) => row.row,
    target: (row) => row.target,
    decided: (row) => row.decided,
    output: (row) => row.output,
    coverage: (row) => row.coverage,
    top: (row) => strongest(row).map((item) => columns[item[0]])[0] ?? "",
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);

  const table = () => {
    const value = sortValue[state.sort];
    const sign = state.dir === "desc" ? -1 : 1;
    const rows = [...shown().rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is no number comes last
      return sign * compare(x, y) || a.row - b.row;
    });
    byId("rows").tBodies[0].replaceChildren(...rows.map((row) => {
      const line = make("tr", undefined, row.row === state.row ? "on" : "");
      line.dataset.row = row.row;
      const head = make("th");
      head.scope = "row";
      const choose = isolated("button", row.name);
      choose.type = "button";
      choose.addEventListener("click", () => {
        change({ row: row.row });
        byId("one").scrollIntoView();
      });
      head.append(choose);
      line.append(head);
      if (labelled) line.append(isolated("td", row.target), isolated("td", row.decided));
      line.append(make("td", number(row.output), "n"), make("td", number(row.coverage), "n"));
      const top = make("td");
      strongest(row).forEach(([column, text, , relevance], i) => {
        const up = relevance > 0;
        const part = make("span", up ? "+ " : "\u2212 ", up ? "up" : "down");
        part.append(make("bdi", columns[column] + (text === "-" ? "" : ` ${text}`)));
        top.append(i ? ", " : "", part);
      });
      line.append(top);
      return line;
    }));
    for (const head of byId("rows").tHead.rows[0].cells) {
      const mine = head.dataset.key === state.sort;
      head.setAttribute("aria-sort", mine ? (sign > 0 ? "ascending" : "descending") : "none");
    }
  };

  // -------------------------------------------------------------- choosing

  const fill = (select, texts, chosen) => {
    select.replaceChildren(...texts.map((text, i) => new Option(text, i, false, i === chosen)));
    select.parentElement.hidden = texts.length < 2;
    select.parentElement.style.display = texts.length < 2 ? "none" : "";
  };
  const targets = [...new Set(explanations.map((e) => e.target))];
  const rivals = (target) => explanations.filter((e) => e.target === target).map((e) => e.contrast);

  const draw = () => {
    const { target, contrast } = shown();
    fill(byId("target"), targets, targets.indexOf(target));
    fill(byId("contrast"), rivals(target), rivals(target).indexOf(contrast));
    byId("row").value = String(state.row);
    byId("before").disabled = state.row === positions[0];
    byId("after").disabled = state.row === positions[positions.length - 1];
    answer();
    table();
  };

  const change = (to) => {
    Object.assign(state, to);
    const { row, q, sort, dir } = state;
    try {
      history.replaceState(null, "", `#row=${row}&q=${q}&sort=${sort}&dir=${dir}`);
    } catch { /* a page without an address keeps no state */ }
    draw();
  };

  const readHash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const [row, q] = [Number(given.get("row") ?? NaN), Number(given.get("q") ?? NaN)];
    if (positions.includes(row)) state.row = row;
    if (explanations[q]) state.q = q;
    if (keys.includes(given.get("sort"))) state.sort = given.get("sort");
    if (["asc", "desc"].includes(given.get("dir"))) state.dir = given.get("dir");
    draw();
  };

  const find = (target, contrast) => {
    const exact = explanations.findIndex((e) => e.target === target && e.contrast === contrast);
    return exact >= 0 ? exact : explanations.findIndex((e) => e.target === target);
  };
  byId("row").replaceChildren(...explanations[0].rows.map((row) => new Option(row.name, row.row)));
  byId("row").addEventListener("change", (event) => change({ row: Number(event.target.value) }));
  const step = (by) => change({ row: positions[positions.indexOf(state.row) + by] });
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("target").addEventListener("change", (event) => change({ q: find(targets[event.target.value], shown().contrast) }));
  byId("contrast").addEventListener("change", (event) =>
    change({ q: find(shown().target, rivals(shown().target)[event.target.value]) }));
  for (const head of byId("rows").tHead.rows[0].cells) {
    const button = make("button", head.textContent);
    button.type = "button";
    button.addEventListener("click", () => {
      const { key } = head.dataset;
      change({ sort: key, dir: state.sort === key && state.dir === "asc" ? "desc" : "asc" });
    });
    head.replaceChildren(button);
  }
  window.addEventListener("hashchange", readHash);
  byId("one").hidden = false;
  readHash();
})();
