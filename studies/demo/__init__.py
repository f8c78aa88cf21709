"""The bundled world: scenes that pictures and sentences tell alike, and small models trained on them."""
