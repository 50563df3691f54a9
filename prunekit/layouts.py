"""The forms a checkpoint is written in; without torch, so that a command line can name them at once."""

PLAIN, PADDED, GGUF, OWN = "plain", "padded", "gguf", "prunekit"
LAYOUTS = (PLAIN, PADDED, GGUF)  # what other programs load
