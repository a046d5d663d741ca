"""Varied prompts: languages, code, numbers, white space, emoji, one token and hundreds."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "SELECT name, age FROM users WHERE",
    "Q: What is 12 times 12?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    '{"name": "Ada", "born": ',
    "La tour Eiffel se trouve à",
    "Der schnelle braune Fuchs springt",
    "日本の首都は",
    "🙂🙃 emoji are",
    "a",
    "   leading spaces and\ttabs\n\n\nand lines",
    "<html>\n<body>\n<h1>",
    "To be, or not to be, that is the question:",
    "import numpy as np\nx = np.",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Water boils at 100 degrees Celsius at sea level. At the top of a mountain",
    "List three fruits:\n1. Apple\n2.",
]
