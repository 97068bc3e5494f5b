"""Files and text, independent of torch."""
