"""The tabs of the page, one file each. `add(model)` lays out the tab. Its buttons run the functions above `add`."""
