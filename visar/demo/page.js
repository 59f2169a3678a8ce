() => {
  // Examples, copy buttons, and the gallery of this visit, which the server knows nothing of.
  const find = (place, root = document) => root.querySelector(place);
  const copy = async text => {
    try { await navigator.clipboard.writeText(text); }
    catch {  // where the page is not served over HTTPS
      const box = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: text }));
      box.select();
      document.execCommand("copy");
      box.remove();
    }
  };
  const show = link => {
    const shown = document.createElement("dialog"), image = find("img", link).cloneNode(), save = link.cloneNode();
    shown.className = "visar-dialog";
    save.textContent = "Download";
    save.className = "visar-button";
    const close = Object.assign(document.createElement("button"), { textContent: "Close", className: "visar-button" });
    close.onclick = () => shown.close();
    shown.onclose = () => shown.remove();
    shown.append(image, save, close);
    document.body.append(shown);
    shown.showModal();
  };
  document.addEventListener("click", async event => {
    const at = event.target.closest("[data-copy], [data-prompt], #visar-gallery a");
    if (!at) return;
    if (at.dataset.prompt) {
      const box = find("#prompt textarea, #prompt input");
      Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), "value").set.call(box, at.dataset.prompt);
      box.dispatchEvent(new Event("input", { bubbles: true }));
    } else if (at.dataset.copy) {
      const text = at.dataset.copy, before = at.textContent;
      at.style.minWidth = `${at.offsetWidth}px`;
      await copy(text.startsWith("?") ? location.origin + location.pathname + text : text);
      at.textContent = "Copied";
      setTimeout(() => { at.textContent = before; }, 1500);
    } else {
      event.preventDefault();
      show(at);
    }
  });
  const seen = new Set();
  const keep = () => {
    const gallery = find("#visar-gallery");
    for (const link of document.querySelectorAll("#images a[data-result], [id^=racer-] a[data-result]")) {
      if (!gallery || seen.has(link.href)) continue;
      seen.add(link.href);
      find("p", gallery)?.remove();
      const kept = link.cloneNode(true);
      kept.title = kept.dataset.result;
      gallery.prepend(kept);
    }
    const details = find("#details details");
    if (details && innerWidth >= 800 && !details.dataset.met) details.open = true;
    if (details) details.dataset.met = "yes";
  };
  let quiet;
  const changed = () => {
    requestAnimationFrame(keep);
    clearTimeout(quiet);
    quiet = setTimeout(() => document.body.classList.add("visar-ready"), 300);
  };
  changed();
  new MutationObserver(changed).observe(document.body, { childList: true, subtree: true });
}
