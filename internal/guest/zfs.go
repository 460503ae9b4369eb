package guest

import (
	"context"
	"fmt"
)

func (c *Cache) ZFS(ctx context.Context, k *Kernel) (string, error) {
	return "", fmt.Errorf("not yet")
}
