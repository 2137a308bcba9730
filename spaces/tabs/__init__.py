"""The tabs of the page, one file each: `add(model)` lays out the tab, and the function above it is run by its buttons.

Gradio passes a tab's inputs to that function by position, which is why it has so many positional parameters.
"""
