"""Model repositories of the Hugging Face Hub: looked up, fetched through its own client, checked byte for byte."""
