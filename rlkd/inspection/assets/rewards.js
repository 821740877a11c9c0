"use strict";
(() => {
  const list = document.getElementById("cases");
  const tools = document.querySelector("form.tools");
  const panel = document.getElementById("detail");
  const keys = document.querySelector("dialog");
  const cases = [...list.children];

  // Numbers of single tokens: one compressed entry per answer, opened when first asked for.
  let data = null;
  const opened = new Map();
  const numbers = (n) => {
    data ??= JSON.parse(document.getElementById("data").textContent);
    if (!opened.has(n)) {
      const bytes = Uint8Array.from(atob(data.samples[n]), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      opened.set(n, new Response(stream).json());
    }
    return opened.get(n);
  };

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const row = (name, number, className) => {
    const made = element("tr", undefined, className);
    const head = made.appendChild(typeof name === "string" ? element("th", name) : element("th"));
    if (typeof name !== "string") head.append(name);
    head.scope = "row";
    made.append(element("td", number));
    return made;
  };

  let shown = null;
  const close = () => {
    shown?.classList.remove("on");
    shown = null;
    panel.hidden = true;
  };
  const show = async (token) => {
    if (token === shown) return;
    shown?.classList.remove("on");
    shown = token;
    token.classList.add("on");
    const place = [...token.parentNode.children].indexOf(token);
    const { columns, texts, logprobs } = await numbers(Number(token.closest(".answer").dataset.n));
    if (token !== shown) return;
    const title = element("p", `Token ${place + 1}: `);
    title.append(element("code", token.textContent));
    const table = element("table");
    for (const [name, column] of Object.entries(columns)) {
      if (column[place] !== null) {
        table.append(row(data.columns[name], (column[place] / 10 ** data.digits).toFixed(data.digits)));
      }
    }
    const parts = [title, table];
    if (texts?.[place].length) {
      const best = element("table");
      best.append(element("caption", "The teacher's most probable tokens"));
      texts[place].forEach((number, i) => {
        const text = data.texts[number], logprob = (logprobs[place][i] ?? -Infinity) / 100;
        const given = text.trim() === token.textContent.trim();
        const percent = (100 * Math.exp(logprob)).toFixed(1);
        best.append(row(element("code", text), `${logprob.toFixed(2)}, ${percent} %`, given ? "given" : ""));
      });
      parts.push(best);
    }
    panel.firstElementChild.replaceChildren(...parts);
    panel.hidden = false;
    // Out of the way of its token.
    panel.classList.remove("up");
    const own = panel.getBoundingClientRect(), other = token.getBoundingClientRect();
    panel.classList.toggle("up", other.bottom > own.top - 8 && other.right > own.left);
  };

  list.addEventListener("mouseover", (event) => {
    if (event.target.matches(".t b")) show(event.target);
  });
  list.addEventListener("mouseout", (event) => {
    if (event.target.matches(".t b") && !event.target.closest(".t").matches(":focus")) close();
  });
  list.addEventListener("click", (event) => {
    if (event.target.matches(".t b")) { event.target.parentNode.focus({ preventScroll: true }); show(event.target); }
  });
  list.addEventListener("focusin", (event) => {
    if (event.target.matches(".t") && shown?.parentNode !== event.target && event.target.querySelector("b")) {
      show(event.target.querySelector("b"));
    }
  });
  list.addEventListener("focusout", (event) => { if (event.target.matches(".t")) close(); });

  // Filters and order
  const text = new Map();
  const textOf = (item) => {
    if (!text.has(item)) {
      text.set(item, [...item.querySelectorAll("h2, .input, .t")].map((e) => e.textContent).join("\n").toLowerCase());
    }
    return text.get(item);
  };
  const apply = () => {
    const form = tools.elements;
    const wanted = form.text.value.toLowerCase();
    const from = Number(form.from.value || 0), to = form.to.value === "" ? Infinity : Number(form.to.value);
    const sources = new Set([...tools.querySelectorAll("[name=source]:checked")].map((box) => box.value));
    const order = form.order.value;
    const place = (item) => (order && item.dataset[order] !== "" ? Number(item.dataset[order]) : -Infinity);
    const sorted = order ? [...cases].sort((a, b) => (place(a) < place(b) ? 1 : place(a) > place(b) ? -1 : 0)) : cases;
    if (sorted.some((item, i) => list.children[i] !== item)) list.append(...sorted);
    let count = 0;
    for (const item of cases) {
      const length = Number(item.dataset.length);
      item.hidden = !(length >= from && length <= to && (!wanted || textOf(item).includes(wanted)));
      count += !item.hidden;
      for (const answer of item.querySelectorAll(".answer")) answer.hidden = !sources.has(answer.dataset.source);
    }
    tools.querySelector("output").textContent = `${count} of ${cases.length} inputs`;
    close();
  };
  let waiting = 0;
  tools.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.querySelector("button.help").addEventListener("click", () => keys.showModal());
  tools.hidden = false;

  // Keys
  const go = (step) => {
    const visible = [...list.children].filter((item) => !item.hidden);
    const here = visible.findIndex((item) => item.contains(document.activeElement));
    const next = visible[here < 0 ? 0 : Math.min(Math.max(here + step, 0), visible.length - 1)];
    next?.focus({ preventScroll: true });
    next?.scrollIntoView({ block: "start" });
  };
  const move = (event) => {
    const tokens = event.target.children;
    const at = shown?.parentNode === event.target ? [...tokens].indexOf(shown) : -1;
    const rtl = getComputedStyle(event.target).direction === "rtl" ? -1 : 1;
    const to = { ArrowRight: at + rtl, ArrowLeft: at - rtl, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || !tokens[to]?.matches("b")) return;
    event.preventDefault();
    show(tokens[to]);
    tokens[to].scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    if (event.key === "Escape") close();
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.target.matches(".t")) move(event);
    if (event.key === "j") go(1);
    if (event.key === "k") go(-1);
    if (event.key === "?") keys.showModal();
    if (event.key === "/") { event.preventDefault(); tools.elements.text.focus(); }
  });
})();
