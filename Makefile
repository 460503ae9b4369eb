.PHONY: test lint bench

test: ## everything that must pass; as root it tests more
	scripts/test

lint: ## needs golangci-lint 2 and shellcheck
	golangci-lint run ./...
	shellcheck scripts/test scripts/bench .ci/run internal/fixture/debian.sh

bench: ## the figures of docs/benchmarks.md, as root
	scripts/bench
