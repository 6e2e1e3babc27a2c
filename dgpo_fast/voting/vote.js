// The page to vote on. All that counts is kept by the server; here is only what is being said of the group that shows.
(() => {
  const $ = (id) => document.getElementById(id);
  const TASKS = { best: "Which picture is best?", rank: "Pick the best, then the next.", rate: "Give each picture 1 to 5 stars." };
  const ENDED = "The command does not answer. Your votes are kept: start it again, and open the address that it prints.";
  let state = null, ask = null, said = [], at = 0, busy = false, sent = 0;

  const count = () => state.group.pictures.length;

  // A look at the server never holds up a vote, and what it finds is left out if a vote was sent meanwhile.
  async function request(path, body) {
    const looks = body === undefined, mine = looks ? sent : ++sent;
    if (!looks) busy = true;
    try {
      const answer = await fetch(path, looks ? {} : { method: "POST", body: JSON.stringify(body) });
      if (answer.ok) {
        const next = await answer.json();
        if (mine === sent) apply(next);
      } else {
        const why = await answer.text();
        if (answer.status === 409) apply(await (await fetch("state")).json());
        tell(why);
      }
    } catch {
      tell(ENDED);
    } finally {
      if (!looks) busy = false;
    }
  }

  function tell(problem) {
    $("problem").textContent = problem;
    $("problem").hidden = !problem;
  }

  function apply(next) {
    const shown = state?.group?.number;
    state = next;
    ask ??= sessionStorage.getItem("ask") ?? state.ask;
    tell(state.fault && `No more groups are drawn: ${state.fault}`);
    progress();
    const group = state.group, over = state.voted === state.total;
    $("group").hidden = !group;
    $("done").hidden = !over;
    $("wait").hidden = Boolean(group) || over || Boolean(state.fault);
    if (over || !group) document.querySelectorAll(".undo").forEach((button) => { button.disabled = state.voted === 0; });
    if (group && group.number !== shown) begin();
    for (const address of state.next) new Image().src = address;
  }

  function progress() {
    const parts = [`${state.voted} of ${state.total} voted`];
    if (state.skipped) parts.push(`${state.skipped} skipped`);
    if (state.voting_left && state.voted < state.total) parts.push(`about ${state.voting_left} of voting left`);
    if (state.drawn < state.total) {
      parts.push(`${state.drawn} drawn${state.drawing_left && !state.fault ? `, the rest in about ${state.drawing_left}` : ""}`);
    }
    $("progress").textContent = parts.join(" · ");
    $("bar").max = state.total;
    $("bar").value = state.voted;
    $("train").textContent = state.train;
  }

  // A group

  function begin() {
    said = ask === "rate" ? Array(count()).fill(0) : [];
    at = 0;
    $("large").close();
    $("prompt").textContent = state.group.prompt;
    $("task").textContent = TASKS[ask];
    for (const radio of document.getElementsByName("ask")) radio.checked = radio.value === ask;
    const grid = $("pictures");
    grid.style.setProperty("--columns", count() <= 5 ? count() : Math.ceil(count() / 2));
    grid.style.setProperty("--rows", count() <= 5 ? 1 : 2);
    grid.replaceChildren(...state.group.pictures.map(figure));
    render();
    grid.querySelector(".pick").focus({ preventScroll: true });
  }

  function button(text, label, action, className = "") {
    const made = document.createElement("button");
    Object.assign(made, { type: "button", textContent: text, className });
    made.setAttribute("aria-label", label);
    made.addEventListener("click", action);
    return made;
  }

  function figure(address, index) {
    const made = document.createElement("figure"), image = new Image(), badge = document.createElement("span");
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 64));
    Object.assign(image, { alt: "", src: address });
    const choose = button("", `Picture ${index + 1}`, () => pick(index), "pick");
    choose.append(image);
    choose.addEventListener("focus", () => { at = index; render(); });
    const line = document.createElement("div");
    badge.className = "badge";
    line.className = "line";
    line.append(badge, button("⤢", `Enlarge picture ${index + 1}`, () => enlarge(index), "enlarge"));
    made.append(choose, line);
    if (ask === "rate") {
      const stars = document.createElement("div");
      stars.className = "stars";
      for (let star = 1; star <= 5; star++) {
        stars.append(button("★", `Picture ${index + 1}: ${star} of 5 stars`, () => rate(index, star)));
      }
      made.append(stars);
    }
    return made;
  }

  function render() {
    [...$("pictures").children].forEach((made, index) => {
      const rank = ask === "rank" ? said.indexOf(index) + 1 : 0, stars = ask === "rate" ? said[index] : 0;
      made.classList.toggle("at", ask === "rate" && index === at);
      made.querySelector(".pick").setAttribute("aria-pressed", String(rank > 0 || stars > 0));
      const badge = made.querySelector(".badge");
      badge.textContent = ask === "rank" && rank ? `${rank}.` : index + 1;
      badge.classList.toggle("on", rank > 0);
      made.querySelectorAll(".stars button").forEach((star, n) => star.classList.toggle("on", n < stars));
    });
    $("next").hidden = ask === "best";
    $("next").textContent = ask === "rank" ? "The rest are equal" : "Next";
    $("next").disabled = !ready();
    document.querySelectorAll(".undo").forEach((one) => { one.disabled = state.voted === 0 && !said.some((value) => value !== 0 || ask === "rank"); });
    $("keys").innerHTML = KEYS[ask] + KEYS.all;
  }

  const key = (...names) => names.map((name) => `<kbd>${name}</kbd>`).join(" ");
  const KEYS = {
    best: `${key("1", "2", "…")} pick · `,
    rank: `${key("1", "2", "…")} next best · ${key("Enter")} the rest are equal · `,
    rate: `${key("←", "→")} picture · ${key("1")} to ${key("5")} stars · ${key("Enter")} next · `,
    all: `${key("U")} undo · ${key("S")} skip · ${key("Z")} enlarge · ${key("M")} best, rank or rate`,
  };

  // What is said

  const ready = () => (ask === "rank" ? said.length > 0 : ask === "rate" && said.every((stars) => stars > 0));

  function send(kind, values) {
    if (!busy) request("vote", { group: state.group.number, said: kind, values });
  }

  function pick(index) {
    at = index;
    if (ask === "best") {
      send("rank", state.group.pictures.map((_, other) => (other === index ? 1 : 2)));
      return;
    }
    if (ask === "rank") {
      said = said.includes(index) ? said.filter((other) => other !== index) : [...said, index];
      if (said.length === count() - 1) finish();
    }
    render();
  }

  function rate(index, stars) {
    said[index] = stars;
    const after = [...said.keys()].map((step) => (index + 1 + step) % count());
    at = after.find((other) => said[other] === 0) ?? index;
    render();
    $("pictures").children[at].querySelector(".pick").focus({ preventScroll: true });
  }

  function finish() {
    if (!ready()) return;
    if (ask === "rate") send("rating", said);
    else send("rank", state.group.pictures.map((_, index) => (said.includes(index) ? said.indexOf(index) : said.length) + 1));
  }

  function undo() {
    if (busy || !state) return;
    if (state.group && said.some((value) => value !== 0 || ask === "rank")) begin();
    else if (state.voted) request("undo", {});
  }

  function change(to) {
    ask = to;
    sessionStorage.setItem("ask", ask);
    if (state.group) begin();
  }

  function enlarge(index) {
    at = (index + count()) % count();
    $("large-image").src = state.group.pictures[at];
    $("large-image").classList.toggle("pixels", $("pictures").querySelectorAll(".pick img")[at].naturalWidth <= 64);
    $("large-image").alt = `Picture ${at + 1} of ${count()}`;
    if (!$("large").open) $("large").showModal();
  }

  function step(by) {
    if ($("large").open) enlarge(at + by);
    else $("pictures").children[(at + by + count()) % count()].querySelector(".pick").focus({ preventScroll: true });
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !state) return;
    const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (pressed === "u" || pressed === "Backspace") undo();
    else if (!state.group || busy) return;
    else if (/^[1-9]$/.test(pressed)) {
      if (ask === "rate") { if (pressed <= 5) rate(at, Number(pressed)); }
      else if (pressed <= count()) pick(pressed - 1);
    } else if (pressed === "s") send("skip", []);
    else if (pressed === "z") $("large").open ? $("large").close() : enlarge(at);
    else if (pressed === "m") change({ best: "rank", rank: "rate", rate: "best" }[ask]);
    else if (pressed.startsWith("Arrow") && event.target.type !== "radio") step(["ArrowLeft", "ArrowUp"].includes(pressed) ? -1 : 1);
    else if (pressed === "Enter" && ask !== "best" && (event.target === document.body || event.target.closest(".pick"))) finish();
    else return;
    event.preventDefault();
  }

  document.addEventListener("keydown", onKey);
  document.querySelectorAll(".undo").forEach((one) => one.addEventListener("click", undo));
  $("skip").addEventListener("click", () => send("skip", []));
  $("next").addEventListener("click", finish);
  $("close").addEventListener("click", () => $("large").close());
  for (const radio of document.getElementsByName("ask")) radio.addEventListener("change", () => change(radio.value));
  const look = () => { if (!busy && (!state || !state.group || state.drawn < state.total)) request("state"); };
  look();
  setInterval(look, 1500);
})();
