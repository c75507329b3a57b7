"""The table of tokenizers: name in a configuration -> class. Adding one is a file, a line here, and a test."""

from fourmill.pipeline.registry import Registry

TOKENIZERS = Registry(
    "tokenizer",
    {
        "spatial": "fourmill.tokenizers.spatial:SpatialTokenizer",
        "vector": "fourmill.tokenizers.vector:VectorTokenizer",
        "text": "fourmill.tokenizers.text:TextTokenizer",
        "sam_instance": "fourmill.tokenizers.sam_instance:SamInstanceTokenizer",
        "human_poses": "fourmill.tokenizers.human_poses:HumanPosesTokenizer",
    },
)
