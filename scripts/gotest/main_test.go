package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const sample = `package sample
import "testing"
func TestPass(t *testing.T) { t.Log("quiet") }
func TestFail(t *testing.T) {
	t.Run("good", func(t *testing.T) {})
	t.Run("bad", func(t *testing.T) { t.Error("loud") })
}
func TestSkip(t *testing.T) {
	t.Log("before")
	t.Run("sub", func(t *testing.T) { t.Skip("no sub\nat all") })
	t.Skipf("no %s", "kernel")
}
`

// TestPrinter compares with what go test prints itself.
func TestPrinter(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module sample\n\ngo 1.26\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a_test.go"), []byte(sample), 0o644))
	gotest := func(args ...string) string {
		cmd := exec.Command("go", append([]string{"test"}, args...)...)
		cmd.Dir = dir
		out, err := cmd.Output()
		require.Error(t, err, "one test fails")
		return string(out)
	}
	// The order is that of go test -v: a subtest comes before its parent.
	times := regexp.MustCompile(`\d+\.\d+s`)
	lines := func(s string) []string {
		var lines []string
		for line := range strings.Lines(times.ReplaceAllString(s, "T")) {
			lines = append(lines, strings.TrimSpace(line))
		}
		slices.Sort(lines)
		return slices.Compact(lines) // go test ends in a second FAIL, which is no event
	}
	var got strings.Builder
	p := printer{w: &got, output: map[string][]string{}}
	require.NoError(t, p.read(strings.NewReader(gotest("-json", "."))))
	assert.Equal(t, lines(gotest(".")), lines(got.String()))
	assert.Equal(t, []string{
		"sample TestSkip/sub: no sub at all",
		"sample TestSkip: no kernel",
	}, p.skipped)
	assert.Empty(t, p.output)
}

func TestPrinterOther(t *testing.T) {
	var got strings.Builder
	p := printer{w: &got, output: map[string][]string{}}
	line, err := json.Marshal(event{Action: "build-output", Output: "x.go:1: undefined\n"})
	require.NoError(t, err)
	require.NoError(t, p.read(strings.NewReader("go: words\n"+string(line)+"\nno end")))
	assert.Equal(t, "go: words\nx.go:1: undefined\nno end", got.String())
}
