"""The mathematics: pure functions on arrays. Axis letters are those of ARCHITECTURE.md's glossary."""
