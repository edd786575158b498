"""ncnn: networks as .param and .bin files, and their runtime. Imports no torch."""
