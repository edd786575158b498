"""One quantization scheme a file: its weight quantizer, its activation quantizer, the layers it treats apart."""
