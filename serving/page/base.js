// What the pages share: elements, words and numbers, and a key that lives as long as its tab.

const $ = (id) => document.getElementById(id);

function set(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

/** An element with a class and children; texts among these stay texts. */
function element(tag, kind = "", ...children) {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(...children);
  return made;
}

/** A bar, filled to a part of its width. */
function gauge(part) {
  const bar = element("i");
  bar.style.width = `${100 * part}%`;
  return element("span", "gauge", bar);
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const rate = (value) => (value < 9.95 && value > 0 ? value.toFixed(1) : value < 1e5 ? plain.format(value) : compact.format(value));
const several = (count, one, many) => `${plain.format(count)} ${count === 1 ? one : many}`;

/** A key kept by this tab only, until it is closed. */
class TabKey {
  constructor(name) {
    this.name = name;
    this.value = sessionStorage.getItem(name);
  }

  get headers() {
    return this.value ? { authorization: `Bearer ${this.value}` } : {};
  }

  keep(value) {
    this.value = value;
    sessionStorage.setItem(this.name, value);
  }

  forget() {
    this.value = null;
    sessionStorage.removeItem(this.name);
  }
}

/** Show the form that asks for the key, or hide it; `why` it is asked for. */
function showLock(locked, why) {
  if (locked && $("unlock").hidden) queueMicrotask(() => $("key").focus());
  $("unlock").hidden = !locked;
  set("why", locked ? why : "");
}

/** Keep the key that is entered into the form, then call `then`. */
function onUnlock(key, then) {
  $("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    key.keep($("key").value.trim());
    $("key").value = "";
    then();
  });
}
