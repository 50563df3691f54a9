"""Names of checkpoint layouts, without importing torch."""

PLAIN, PADDED, GGUF, OWN = "plain", "padded", "gguf", "prunekit"
LAYOUTS = (PLAIN, PADDED, GGUF)  # what other programs load
