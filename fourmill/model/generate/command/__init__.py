"""`fourmill generate`: photos, texts, label files and tokens in; pictures, values and tokens out."""
