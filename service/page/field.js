// The field for words. It stays hidden where the encoder reads pictures alone.

const form = document.querySelector("#words");
const field = document.querySelector("#words-field");

/** Show the field, and call onWords(text) whenever the visitor asks with it. */
export function startField(longest, onWords) {
  field.maxLength = longest;
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (text) onWords(text);
  });
}

/** Put the words of the shown query into the field; "" for another query. */
export function fillField(text) {
  field.value = text;
}

/** Whether words, and no file, are pasted into the field, dropped on it or dragged over it. */
export function takesWords(event, transfer) {
  return event.target === field && !transfer.types.includes("Files");
}
