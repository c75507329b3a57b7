"""The table of tokenizers: name in a configuration -> class. Adding one is a file, a line here, and a test."""

from fourmill.pipeline.registry import Registry

TOKENIZERS = Registry(
    "tokenizer",
    {
        "spatial": "fourmill.tokenizers.spatial:SpatialTokenizer",
        "text": "fourmill.tokenizers.text:TextTokenizer",
    },
)
