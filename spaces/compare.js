// The slider chooses which of the sheets stands left of the last one.
element.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  const { image, caption } = props.value[event.target.value];
  Object.assign(element.querySelector(".left"), { src: image, alt: caption });
  element.querySelector(".left-caption").textContent = caption;
  event.target.setAttribute("aria-valuetext", caption);
});
