"""The papers' claims, one after the other, on the embedded model: what they say, what comes out here, what holds."""
