// Draws the charts when they come into view, in the colors of the theme; reloads a live report.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // "--name" and "--name/opacity" become colors of the style sheet
  function colored(value, style) {
    if (Array.isArray(value)) return value.map((item) => colored(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, colored(item, style)]));
    }
    const found = typeof value === "string" && value.match(/^(--[a-z]+(?:-\d+)?)(?:\/([\d.]+))?$/);
    if (!found) return value;
    const hex = style.getPropertyValue(found[1]).trim();
    const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${channels.join(",")},${found[2] ?? 1})`;
  }

  function merged(base, extra) {
    const out = { ...base };
    for (const [key, value] of Object.entries(extra ?? {})) {
      const nested = value && typeof value === "object" && !Array.isArray(value);
      out[key] = nested ? merged(base[key] ?? {}, value) : value;
    }
    return out;
  }

  // plotly centers a constant line, with negative numbers below it
  function range(data) {
    const values = data.flatMap((trace) => (trace.orientation === "h" ? [] : trace.y ?? [])).filter(Number.isFinite);
    const [first] = values;
    if (!values.length || values.some((value) => value !== first)) return {};
    return { range: first === 0 ? [-0.02, 1] : [Math.min(0, 2 * first), Math.max(0, 2 * first)] };
  }

  function draw(figure) {
    const plot = figure.querySelector(".plot");
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    const style = getComputedStyle(document.documentElement);
    const axis = {
      gridcolor: "--line", linecolor: "--line", zeroline: false, tickfont: { color: "--muted", size: 11 },
      automargin: true, title: { standoff: 6, font: { color: "--muted", size: 11 } },
    };
    const named = data.filter((trace) => trace.showlegend !== false && trace.name);
    const base = {
      autosize: true, margin: { l: 8, r: 8, t: 6, b: 6 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: "--text", size: 12 },
      showlegend: named.length > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      hovermode: "x unified", hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--text" } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: merged(axis, { title: { text: "step" }, showgrid: false }),
      yaxis: merged(axis, { nticks: 6, tickformat: ".6~g", ...range(data) }),
    };
    Plotly.react(plot, colored(data, style), colored(merged(base, layout), style), {
      displayModeBar: false, responsive: true,
    });
    figure.dataset.drawn = "yes";
  }

  const charts = [...document.querySelectorAll("figure.chart")];
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !target.dataset.drawn) draw(target);
    }
  }, { rootMargin: "400px" });
  charts.forEach((figure) => seen.observe(figure));
  dark.addEventListener("change", () => charts.filter((figure) => figure.dataset.drawn).forEach(draw));
  addEventListener("beforeprint", () => charts.filter((figure) => figure.offsetParent).forEach(draw));

  // a live report is reloaded; what was opened stays open
  const seconds = Number(document.documentElement.dataset.reload);
  const key = `lightning-grpo ${location.pathname}`;
  if (seconds) {
    const opened = JSON.parse(sessionStorage.getItem(key) ?? "[]");
    document.querySelectorAll("details[id]").forEach((item) => { item.open = opened.includes(item.id) || item.open; });
    setTimeout(() => {
      const open = [...document.querySelectorAll("details[id][open]")].map((item) => item.id);
      sessionStorage.setItem(key, JSON.stringify(open));
      location.reload();
    }, 1000 * seconds);
  }
})();
