// What gradio's page lacks: alternative texts of pictures in the conversation, a name of the settings'
// button, Esc to stop a reply, tags copied as they were written (demo/as_written.py), and files that
// are dropped or pasted anywhere: without it a browser opens a dropped file in place of the page.
() => {
  const chinese = navigator.language.toLowerCase().startsWith("zh");
  document.documentElement.lang = chinese ? "zh" : "en";
  const word = chinese ? "图片" : "Picture";
  const frames = chinese ? "模型看到的帧及其时间" : "The frames that the model looks at, with their times";
  const name = () => {
    let number = 0;
    document.querySelectorAll("#chat .message img").forEach((image) => {
      const wanted = image.src.includes("/strip-") ? frames : `${word} ${++number}`;
      if (image.alt !== wanted) image.alt = wanted;
    });
    const toggle = document.querySelector("#settings .toggle-button");
    if (toggle && !toggle.title) {
      toggle.title = chinese ? "设置" : "Settings";
      toggle.setAttribute("aria-label", toggle.title);
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  const written = (text) => text.replaceAll("<\u2060", "<");
  const clipboard = navigator.clipboard; // none where the page comes by http from another machine
  const write = clipboard?.writeText.bind(clipboard);
  if (clipboard) clipboard.writeText = (text) => write(written(text));
  document.addEventListener("copy", (event) => {
    const text = String(getSelection());
    if (!text.includes("<\u2060")) return;
    event.clipboardData.setData("text/plain", written(text));
    event.preventDefault();
  });
  const toBox = (event, key) => {
    if (!event[key]?.files.length || event.target.closest?.("#box")) return;
    event.preventDefault();
    const files = new DataTransfer();
    for (const file of event[key].files) files.items.add(file);
    const again = new event.constructor(event.type, { [key]: files, bubbles: true, cancelable: true });
    document.querySelector("#box textarea")?.dispatchEvent(again);
  };
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => toBox(event, "dataTransfer"));
  document.addEventListener("paste", (event) => toBox(event, "clipboardData"));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#box .stop-button")?.click();
  });
}
