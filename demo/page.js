// What gradio's page lacks: alternative texts of pictures in the conversation, a name of the settings'
// button, Esc to stop a reply.
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
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#box .stop-button")?.click();
  });
}
