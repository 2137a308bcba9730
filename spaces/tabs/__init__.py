"""The tabs of the page, one file each: `add(model)` lays out a tab, and its buttons run the function above it."""
