"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const SMALL = 128; // pixels: up to here they are shown as squares

  // One clock for all videos: what comes into view joins in where the others are.

  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let speed = 1, base = 0, since = performance.now();
  const clock = () => base + (playing ? ((performance.now() - since) / 1000) * speed : 0);
  const hold = () => { base = clock(); since = performance.now(); };
  const shown = new Set();

  function follow(video) {
    if (playing && video.paused) video.play().catch(() => {});
    if (!playing && !video.paused) video.pause();
    if (!(video.duration > 0) || video.readyState < 1 || video.seeking) return;
    const due = clock() % video.duration;
    let late = due - video.currentTime;
    late -= video.duration * Math.round(late / video.duration);
    const seekable = video.seekable.length && video.seekable.end(0) > 0; // not of every server
    if (seekable && Math.abs(late) > (playing ? 0.2 : 0.01)) video.currentTime = due;
    video.playbackRate = Math.max(0.07, speed * (1 + Math.max(-0.5, Math.min(0.5, 2 * late))));
  }
  const followAll = () => shown.forEach(follow);

  function enter(video) {
    shown.add(video);
    if (!video.hasAttribute("src")) video.setAttribute("src", video.dataset.source);
    video.preload = "auto";
    follow(video);
  }
  function leave(video) { // players are few: one that is out of sight is given back
    shown.delete(video);
    video.pause();
    video.removeAttribute("src");
    video.load();
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? enter(entry.target) : leave(entry.target);
  }, { rootMargin: "40% 0px" });

  function prepare(video) {
    video.dataset.source = video.getAttribute("src");
    video.controls = false;
    video.addEventListener("loadedmetadata", () => { look(video, video.videoWidth, video.videoHeight); follow(video); });
    video.addEventListener("error", () => { if (video.error) video.closest(".cell")?.classList.add("broken"); });
    seen.observe(video);
  }
  function look(picture, width, height) {
    picture.classList.toggle("small", width <= SMALL);
    picture.width = width;
    picture.height = height;
  }
  for (const image of all("img.clip")) {
    const known = () => image.naturalWidth && look(image, image.naturalWidth, image.naturalHeight);
    image.complete ? known() : image.addEventListener("load", known);
    image.addEventListener("error", () => image.closest(".cell").classList.add("broken"));
  }

  // The bar

  const bar = one(".bar");
  const play = one("#play");
  function toggle(state = !playing) {
    hold();
    playing = state;
    if (play) play.textContent = playing ? "Pause all" : "Play all";
    followAll();
  }
  function restart() {
    base = 0;
    since = performance.now();
    shown.forEach((video) => { video.currentTime = 0; });
    followAll();
  }
  if (bar) {
    bar.hidden = false;
    play.addEventListener("click", () => toggle());
    one("#restart").addEventListener("click", restart);
    one("#speed").addEventListener("change", (event) => { hold(); speed = Number(event.target.value); followAll(); });
    one("#size").addEventListener("change", (event) => document.documentElement.style.setProperty("--cell", event.target.value + "px"));
    const measure = () => document.documentElement.style.setProperty(
      "--bar", (getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0) + "px");
    new ResizeObserver(measure).observe(bar);
    measure();
  }
  const filter = one("#filter"), count = one("#count"), lines = all("tr.line");
  function sift() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const line of lines) {
      const text = one("th", line).textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      left += !line.hidden;
    }
    for (const table of all(".grid")) table.closest(".gridded").hidden = !all("tr.line", table).some((line) => !line.hidden);
    count.textContent = words.length ? `${left} of ${lines.length}` : "";
  }
  filter?.addEventListener("input", sift);

  for (const box of all(".columns input")) {
    const section = box.closest("section");
    const apply = () => {
      all(`[data-column="${box.value}"]`, section).forEach((cell) => { cell.hidden = !box.checked; });
      for (const table of all(".grid", section)) {
        table.style.setProperty("--columns", all("thead th[data-column]", table).filter((head) => !head.hidden).length);
      }
    };
    box.addEventListener("change", apply);
    box.closest("fieldset").hidden = false;
    apply();
  }

  // Tables of figures

  for (const table of all(".figures table")) {
    all("thead th", table).forEach((head, index) => one("button", head)?.addEventListener("click", () => {
      const upwards = head.getAttribute("aria-sort") !== "ascending";
      all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
      const value = (body) => body.rows[0].cells[index].dataset.value ?? "";
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const by = head.classList.contains("number") ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
        return upwards ? by : -by;
      };
      [...table.tBodies].sort(order).forEach((body) => table.append(body));
    }));
  }
  for (const button of all("button.open")) {
    const more = button.closest("tbody").rows[1];
    more.hidden = true;
    button.hidden = false;
    button.addEventListener("click", () => {
      more.hidden = !more.hidden;
      button.setAttribute("aria-expanded", String(!more.hidden));
    });
  }

  // Copying

  async function copy(button) {
    const text = one("code", button.parentElement).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // where pages from files may not
      const area = document.createElement("textarea");
      area.value = text;
      button.parentElement.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  }
  document.addEventListener("click", (event) => {
    if (event.target.closest(".copy")) copy(event.target.closest(".copy"));
  });
  for (const button of all(".copy")) button.hidden = false;

  // One clip, large

  const dialog = one("dialog");
  let current = null;
  function open(cell) {
    const clip = one(".clip", cell), line = cell.closest("tr"), screen = one(".screen", dialog);
    close();
    const large = document.createElement(clip.tagName);
    const place = () => {
      const width = clip.videoWidth || clip.naturalWidth || clip.width || 64, height = clip.videoHeight || clip.naturalHeight || clip.height || 64;
      const fit = Math.min((screen.clientWidth - 24) / width, (innerHeight * 0.6) / height);
      const scale = width <= SMALL ? Math.max(1, Math.floor(fit)) : Math.min(fit, 4);
      large.style.width = `${width * scale}px`;
      large.classList.toggle("small", width <= SMALL);
    };
    if (large.tagName === "VIDEO") {
      Object.assign(large, { muted: true, loop: true, playsInline: true, src: clip.dataset.source });
      large.addEventListener("loadedmetadata", () => { place(); follow(large); });
      shown.add(large);
    } else {
      large.src = clip.src;
    }
    large.setAttribute("aria-label", clip.getAttribute("aria-label") || clip.alt);
    current = { cell, large };
    one("h2", dialog).textContent = one(".prompt", line).textContent;
    one(".about", dialog).textContent = [cell.dataset.setting, one(".seed", line)?.textContent, one(".took", cell)?.textContent].filter(Boolean).join(" \u00b7 ");
    const code = one(".code", cell);
    one(".command", dialog).replaceChildren(...(code ? [code.cloneNode(true)] : []));
    screen.replaceChildren(large);
    if (!dialog.open) dialog.showModal();
    place();
    if (large.tagName === "VIDEO") follow(large);
  }
  function close() {
    if (!current) return;
    shown.delete(current.large);
    current.large.remove();
    current = null;
  }
  function step(across, down) {
    const seenLines = lines.filter((line) => !line.hidden && one(".clip", line));
    const cells = (line) => all(".cell", line).filter((cell) => !cell.closest("td").hidden && !cell.classList.contains("broken"));
    const row = seenLines.indexOf(current.cell.closest("tr")), here = cells(seenLines[row]);
    const column = here.indexOf(current.cell);
    const next = down ? cells(seenLines[row + down] ?? seenLines[row]) : here;
    open(next[Math.max(0, Math.min(next.length - 1, column + across))] ?? current.cell);
  }
  for (const frame of all(".cell .frame")) {
    const clip = one(".clip", frame), button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    button.setAttribute("aria-label", "Enlarge: " + (clip.getAttribute("aria-label") || clip.alt));
    button.addEventListener("click", () => open(frame.closest(".cell")));
    frame.append(button);
  }
  if (dialog) {
    dialog.addEventListener("close", close);
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    one(".shut", dialog).addEventListener("click", () => dialog.close());
    one(".before", dialog).addEventListener("click", () => step(-1, 0));
    one(".after", dialog).addEventListener("click", () => step(1, 0));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (current && moves[event.key]) step(...moves[event.key]);
    else if (event.key === " " && bar && !event.target.closest("button, summary, a")) toggle();
    else if (event.key === "r" && bar) restart();
    else if (event.key === "/" && filter && !current) filter.focus();
    else return;
    event.preventDefault();
  });

  const videos = all("video.clip");
  videos.forEach(prepare);
  toggle(playing);
  if (videos.length) setInterval(followAll, 200);
  document.addEventListener("visibilitychange", followAll);
})();
