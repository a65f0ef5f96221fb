"""From a model's Python code to a program: the recorder, what it guards, and the search for regions."""
