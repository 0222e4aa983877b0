"""Networks and their weights from wherever they are stored."""
