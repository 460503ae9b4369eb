package layerdir

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestListingSeconds: times in whole seconds, as ext4 with small inodes has
// them.
func TestListingSeconds(t *testing.T) {
	testenv.RequireRoot(t)
	home := testenv.Ext4(t, 64, "-I 128")
	d, other := mustOpen(t, home), mustOpen(t, home)
	for _, id := range []string{"a", "b"} {
		time.Sleep(settled + 100*time.Millisecond)
		for range 2 {
			p, err := d.Persistent(id)
			require.NoError(t, err)
			require.Zero(t, p.Count)
		}
		require.NoError(t, other.SetPersistent(id, Persistent{Count: 1}))
		for range 30 {
			p, err := d.Persistent(id)
			require.NoError(t, err)
			require.Equal(t, 1, p.Count, "it is there")
			time.Sleep(50 * time.Millisecond)
		}
	}
}
