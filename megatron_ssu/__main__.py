from megatron_ssu.cli import main

if __name__ == "__main__":
    main()
