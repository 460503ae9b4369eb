package auto_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/auto"
)

// The code in the README is that of the example, which is run, and its table
// has every driver.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "README.md"))
	if os.IsNotExist(err) {
		t.Skip("the test does not run in the source tree")
	}
	require.NoError(t, err)
	source, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	_, code, ok := strings.Cut(string(source), "\t// README begin\n")
	require.True(t, ok)
	code, _, ok = strings.Cut(code, "\t// README end\n")
	require.True(t, ok)
	var lines []string
	for line := range strings.Lines(code) {
		lines = append(lines, strings.TrimPrefix(line, "\t"))
	}
	assert.Contains(t, string(readme), "```go\n"+strings.Join(lines, "")+"```\n")
	for _, name := range auto.Drivers() {
		assert.Contains(t, string(readme), "\n| "+name+" ")
	}
}
