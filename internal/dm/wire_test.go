package dm

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestNoDevices: a kernel without devices answers with an empty list.
func TestNoDevices(t *testing.T) {
	list, err := decodeNames(nil)
	require.NoError(t, err)
	require.Empty(t, list)
	_, err = decodeNames(make([]byte, 4))
	require.Error(t, err)
}
