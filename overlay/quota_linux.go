package overlay

import "github.com/layerfs/layerfs/internal/quota"

// quotas limits the directories of the layers.
func (m *mechanism) quotas() *quota.Layers {
	return &quota.Layers{Projects: m.projects, Reason: m.features.Reasons["Quota"], Dir: m.dir, Home: m.home}
}
