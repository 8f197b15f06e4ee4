"""What a hospital does with a trained model's codes on its own scans. Everything made here is private: it stays."""
