"""Values as words and back: one module for each kind of value; `formats` is the table."""
